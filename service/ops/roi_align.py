"""RoI Align, the operator of Mask R-CNN: reads the feature map between its cells, so that no box is ever rounded.
Called by the RoI poolers of `modeling` through `multi_scale`; knows feature maps and boxes only.

Shapes: see `rois.py`; h x w is the output size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torchvision
from torch import Tensor

from service.ops.rois import Boxes, as_pair, as_rois, at_least_float32, check_adaptive


def roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = False,
) -> Tensor:
    """Average the bilinearly interpolated values at regular points of every bin of every box (Mask R-CNN, section 3).

    A point up to one cell outside the map reads its border, one further out reads 0. Boxes get no gradient.

    Args:
        input: (N, C, H, W) features.
        boxes: (K, 5) as (image index, x1, y1, x2, y2), or (L, 4) for each image.
        output_size: (h, w), or one number for both.
        spatial_scale: cells a unit of the boxes, `1 / stride` for boxes in image pixels.
        sampling_ratio: points a side of a bin: 1 is one point, 2 is four; 0 (or less) as many as the bin has cells,
            rounded up.
        aligned: False, as torchvision's models have it: the value of cell i stands at i, and a box is at least one cell
            wide. True, as detectron2's have it: it stands at the cell's middle, i + 0.5.

    Returns:
        (K, C, h, w) of the input's type. Half precision is computed in float32 and rounded once, at the end.

    Raises:
        ValueError: see `as_rois`, `as_pair` and, with adaptive sampling, `check_adaptive`.
    """
    rois = as_rois(boxes, input, spatial_scale)
    if sampling_ratio <= 0:
        check_adaptive(rois, input)
    pooled: Tensor = torchvision.ops.roi_align(
        at_least_float32(input), rois, as_pair(output_size), sampling_ratio=sampling_ratio, aligned=aligned
    )
    return pooled.to(input.dtype)
