"""RoI Warp, the operator of Multi-task Network Cascades (MNC): a box is rounded to the grid once, then resampled.

Shapes: see `rois.py`; h x w is the output size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor

from service.ops.rois import Boxes, as_pair, as_rois, at_least_float32


def roi_warp(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 1,
    aligned: bool = False,
) -> Tensor:
    """Round every box to whole cells and resample it bilinearly to the output grid (Dai et al., MNC, section 4).

    This is RoI Align after RoI Pool's first rounding, which is how Mask R-CNN describes it. The layer that MNC released
    also rounds, but it takes the maximum of several points and passes a gradient to the box; this one does neither.

    Args:
        input: (N, C, H, W) features.
        boxes: (K, 5) as (image index, x1, y1, x2, y2), or (L, 4) for each image.
        output_size: (h, w), or one number for both.
        spatial_scale: cells per unit of the boxes, `1 / stride` for boxes in image pixels.
        sampling_ratio: points per side of an output element, averaged; 1 is plain bilinear resampling.
        aligned: see `roi_align`.

    Returns:
        (K, C, h, w) in the input's dtype. Half precision is computed in float32 and rounded once, at the end.

    Raises:
        ValueError: see `as_rois` and `as_pair`, or a sampling_ratio below 1.
    """
    if sampling_ratio < 1:
        raise ValueError(f"expected a sampling_ratio of 1 or more, got {sampling_ratio}")
    rois = as_rois(boxes, input, spatial_scale)
    # Halves round away from zero, as in the kernels of RoI Pool and MNC; torch.round would round them to even.
    rounded = torch.copysign((rois.abs() + 0.5).floor(), rois)
    pooled: Tensor = torchvision.ops.roi_align(
        at_least_float32(input), rounded, as_pair(output_size), sampling_ratio=sampling_ratio, aligned=aligned
    )
    return pooled.to(input.dtype)
