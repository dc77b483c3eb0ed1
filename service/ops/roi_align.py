"""RoI Align, the operator of Mask R-CNN: interpolates the feature map between its cells, so that boxes are never
rounded.

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

    A point up to one cell outside the map reads the border; a point further out reads 0. Boxes get no gradient.

    Args:
        input: (N, C, H, W) features.
        boxes: (K, 5) as (image index, x1, y1, x2, y2), or (L, 4) for each image.
        output_size: (h, w), or one number for both.
        spatial_scale: cells per unit of the boxes, `1 / stride` for boxes in image pixels.
        sampling_ratio: points per bin side: 1 is one point, 2 is four; 0 (or less) means as many as the bin has cells,
            rounded up.
        aligned: False, like torchvision's models: the value of cell i is located at i, and a box is at least one cell
            wide. True, like detectron2's: the value is located at the cell's centre, i + 0.5.

    Returns:
        (K, C, h, w) in the input's dtype. Half precision is computed in float32 and rounded once, at the end.

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
