"""Crops, the region extractor of R-CNN: every box is cut from the image itself, with context, and warped to one size.

Shapes: see `rois.py`, a cell being an image pixel here; h x w is the output size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor
from torch.nn.functional import pad

from service.ops.rois import Boxes, as_pair, as_rois, at_least_float32


def crop(
    input: Tensor, boxes: Boxes, output_size: int | Sequence[int], spatial_scale: float = 1.0, padding: int = 16
) -> Tensor:
    """Cut every box with its context and warp it to the output size, whatever its shape (R-CNN, appendix A, "warp").

    The box is enlarged so that after warping exactly `padding` pixels of context surround it, then sampled bilinearly,
    one point per output pixel, without smoothing (like R-CNN's code). Outside the image all values are 0: the mean
    colour, if images are normalised. Unlike R-CNN's code, the enlarged box is not rounded to whole pixels.

    Args:
        input: (N, C, H, W) images.
        boxes: (K, 5) as (image index, x1, y1, x2, y2), or (L, 4) for each image.
        output_size: (h, w), or one number for both; R-CNN's is 227.
        spatial_scale: input pixels per unit of the boxes; 1 unless the boxes are in another frame.
        padding: pixels of context on each side of the output.

    Returns:
        (K, C, h, w) in the input's dtype. Half precision is computed in float32 and rounded once, at the end.

    Raises:
        ValueError: see `as_rois` and `as_pair`; or the padding leaves no room for the box.
    """
    height, width = as_pair(output_size)
    if padding < 0 or 2 * padding >= min(height, width):
        raise ValueError(f"expected a padding from 0 to less than half of {(height, width)}, got {padding}")
    rois = as_rois(boxes, input, spatial_scale)
    indices, starts, ends = torch.split(rois, [1, 2, 2], dim=1)
    shares = rois.new_tensor([padding / (width - 2 * padding), padding / (height - 2 * padding)])
    context = (ends - starts) * shares
    # RoI Align extends the map's border by one cell; with a frame of zeros around the map, it extends zeros.
    framed = pad(at_least_float32(input), (1, 1, 1, 1))
    enlarged = torch.cat([indices, starts - context + 1, ends + context + 1], dim=1)
    crops: Tensor = torchvision.ops.roi_align(framed, enlarged, (height, width), sampling_ratio=1, aligned=True)
    return crops.to(input.dtype)
