"""RoI Align with the maximum over a bin's points, an aggregation that the text of Mask R-CNN allows.

Shapes: see `rois.py`; h x w is the output size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor
from torch.nn.functional import max_pool2d

from service.ops.rois import Boxes, as_pair, as_rois, at_least_float32, check_adaptive

# All points are in memory before their maximum is taken; 2 ** 26 float32 values are 256 MiB.
_MAX_VALUES_AT_ONCE = 2**26


def roi_align_max(
    input: Tensor,
    boxes: Boxes,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = False,
) -> Tensor:
    """Take the largest of the bilinearly interpolated values at regular points of every bin of every box.

    The points are `roi_align`'s. The gradient of a bin goes to the four cells around its largest point; boxes get none.

    Args:
        input: (N, C, H, W) features.
        boxes: (K, 5) as (image index, x1, y1, x2, y2), or (L, 4) for each image.
        output_size: (h, w), or one number for both.
        spatial_scale: cells per unit of the boxes, `1 / stride` for boxes in image pixels.
        sampling_ratio: points per bin side; 0 (or less) means as many as the bin has cells, rounded up.
        aligned: see `roi_align`.

    Returns:
        (K, C, h, w) in the input's dtype. Half precision is computed in float32 and rounded once, at the end.

    Raises:
        ValueError: see `as_rois`, `as_pair` and, with adaptive sampling, `check_adaptive`.
    """
    rois = as_rois(boxes, input, spatial_scale)
    size = as_pair(output_size)
    features = at_least_float32(input)
    if sampling_ratio > 0:
        pooled = _largest_points(features, rois, size, (sampling_ratio, sampling_ratio), aligned)
    else:
        check_adaptive(rois, input)
        pooled = _largest_adaptive_points(features, rois, size, aligned)
    return pooled.to(input.dtype)


def _largest_points(
    features: Tensor, rois: Tensor, size: tuple[int, int], points: tuple[int, int], aligned: bool
) -> Tensor:
    # The points of an h x w output are the bin centres of a finer grid, which RoI Align reads with one point per bin.
    finer = (size[0] * points[0], size[1] * points[1])
    at_once = max(1, _MAX_VALUES_AT_ONCE // (features.shape[1] * finer[0] * finer[1]))
    parts = [
        max_pool2d(torchvision.ops.roi_align(features, part, finer, sampling_ratio=1, aligned=aligned), points)
        for part in torch.split(rois, at_once)
    ]
    return torch.cat(parts)


def _largest_adaptive_points(features: Tensor, rois: Tensor, size: tuple[int, int], aligned: bool) -> Tensor:
    bins = (rois[:, [4, 3]] - rois[:, [2, 1]]).clamp(min=0 if aligned else 1) / rois.new_tensor(size)
    points = bins.ceil().to(torch.int64)
    # Boxes with the same number of points are processed together. At least one group, so that an empty input has a
    # gradient too.
    groups = torch.unique(points.clamp(min=1), dim=0).tolist() or [[1, 1]]
    members = [(points.clamp(min=1) == points.new_tensor(group)).all(dim=1).nonzero().squeeze(1) for group in groups]
    parts = [
        _largest_points(features, rois[rows], size, (group[0], group[1]), aligned)
        for rows, group in zip(members, groups, strict=True)
    ]
    pooled = torch.cat(parts)[torch.argsort(torch.cat(members))]
    # An empty box has no points; RoI Align returns 0 for it.
    return pooled.masked_fill((points == 0).any(dim=1).reshape(-1, 1, 1, 1), 0)
