"""RoI Pool, the operator of Fast R-CNN: rounds a box to the grid of the feature map, twice, and takes maxima.
Called by the RoI poolers of `modeling` through `multi_scale`; knows feature maps and boxes only.

Shapes: see `rois.py`; h x w is the output size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torchvision
from torch import Tensor

from service.ops.rois import Boxes, as_pair, as_rois, at_least_float32


def roi_pool(input: Tensor, boxes: Boxes, output_size: int | Sequence[int], spatial_scale: float = 1.0) -> Tensor:
    """Pool the largest value of every bin of every box (Girshick, Fast R-CNN, section 2.1).

    Two quantisations: the corners are rounded to whole cells (the last one belongs to the box, so a box is at least one
    cell), and a bin reaches from the floor of its start to the ceiling of its end, so that neighbours may share cells.
    A bin without cells of the map is 0. The gradient of a bin goes to its largest cell, and adds up over boxes and bins
    that share it; boxes get none.

    Args:
        input: (N, C, H, W) features.
        boxes: (K, 5) as (image index, x1, y1, x2, y2), or (L, 4) for each image.
        output_size: (h, w), or one number for both.
        spatial_scale: cells a unit of the boxes, `1 / stride` for boxes in image pixels.

    Returns:
        (K, C, h, w) of the input's type; the values are elements of the input, so half precision loses nothing.

    Raises:
        ValueError: see `as_rois` and `as_pair`.
    """
    rois = as_rois(boxes, input, spatial_scale)
    pooled: Tensor = torchvision.ops.roi_pool(at_least_float32(input), rois, as_pair(output_size))
    return pooled.to(input.dtype)
