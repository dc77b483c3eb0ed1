"""RoI Pool, the operator of Fast R-CNN: rounds a box to the grid of the feature map, twice, and takes maxima.

Shapes: see `rois.py`; h x w is the output size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torchvision
from torch import Tensor

from service.ops.rois import Boxes, as_pair, as_rois, at_least_float32


def roi_pool(input: Tensor, boxes: Boxes, output_size: int | Sequence[int], spatial_scale: float = 1.0) -> Tensor:
    """Pool the largest value of every bin of every box (Girshick, Fast R-CNN, section 2.1).

    There are two quantisations: corners are rounded to whole cells (the last cell belongs to the box, so a box is at
    least one cell), and a bin extends from the floor of its start to the ceiling of its end, so neighbouring bins may
    share cells. A bin outside the map is 0. The gradient of a bin goes to its largest cell, summed over the boxes and
    bins that share it; boxes get none.

    Args:
        input: (N, C, H, W) features.
        boxes: (K, 5) as (image index, x1, y1, x2, y2), or (L, 4) for each image.
        output_size: (h, w), or one number for both.
        spatial_scale: cells per unit of the boxes, `1 / stride` for boxes in image pixels.

    Returns:
        (K, C, h, w) in the input's dtype; the values are elements of the input, so half precision loses nothing.

    Raises:
        ValueError: see `as_rois` and `as_pair`.
    """
    rois = as_rois(boxes, input, spatial_scale)
    pooled: Tensor = torchvision.ops.roi_pool(at_least_float32(input), rois, as_pair(output_size))
    return pooled.to(input.dtype)
