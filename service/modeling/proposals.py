"""Selective search: proposals from colours and textures alone, as in R-CNN and Fast R-CNN. Knows pixels and boxes;
knows no networks.
"""

from __future__ import annotations

import cv2
import numpy as np

from service.errors import ServiceError
from service.modeling.config import ProposalsConfig
from service.structures import Float32Array, UInt8Array

_TALLEST = 3
"""Up to this height / width, the picture is scaled to `search_width`."""


def selective_search(pixels: UInt8Array, config: ProposalsConfig) -> Float32Array:
    """Propose boxes by merging similar neighbouring regions (Uijlings et al. 2013), with OpenCV's implementation.

    Takes seconds of one core. OpenCV returns boxes in random order; here a fixed seed orders them, so that the same
    picture always has the same proposals.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        config: how to search, and how many boxes to keep.

    Returns:
        (L, 4) as (x1, y1, x2, y2) in pixels of the image, without duplicates.

    Raises:
        ServiceError: OpenCV is installed without its contributed modules.
    """
    if not hasattr(cv2, "ximgproc"):
        raise ServiceError(
            "selective search needs OpenCV's contributed modules: install opencv-contrib-python-headless instead of "
            "opencv-python-headless, or give proposals in the request"
        )
    height, width = pixels.shape[:2]
    # A picture much taller than wide is scaled down further, because the time grows with the number of pixels.
    scale = config.search_width / max(width, height / _TALLEST)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), size))
    if config.mode == "quality":
        search.switchToSelectiveSearchQuality()
    else:
        search.switchToSelectiveSearchFast()
    found = np.unique(np.asarray(search.process()).reshape(-1, 4), axis=0).astype(np.float32)  # x, y, width, height
    boxes = np.concatenate([found[:, :2], found[:, :2] + found[:, 2:]], axis=1)
    boxes *= np.tile(np.array([width / size[0], height / size[1]], dtype=np.float32), 2)
    return boxes[np.random.default_rng(0).permutation(len(boxes))[: config.max_count]]
