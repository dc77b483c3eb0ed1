"""The multi-level form of every RoI operator: each box is pooled from the one feature level that suits its size.
Knows boxes and feature maps; knows nothing of classes, losses or networks.

Shapes: L boxes of one image, K boxes of the whole batch. Boxes are (x1, y1, x2, y2) in pixels of the resized image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from service.ops.rois import rois_of

# A box of this side in pixels (ImageNet's picture size) belongs on this level, whose stride is 2 ** 4.
_CANONICAL_SCALE, _CANONICAL_LEVEL = 224, 4


def assign_levels(boxes: Sequence[Tensor], *, min_level: int, max_level: int) -> Tensor:
    """Choose the feature level from which each box is pooled: equation (1) of the FPN paper.

    `level = floor(4 + log2(sqrt(width * height) / 224))`, where level k has the stride `2 ** k`.

    Args:
        boxes: (L, 4) for each image.
        min_level: `log2` of the finest level's stride.
        max_level: `log2` of the coarsest level's stride.

    Returns:
        (K,) int64 in [0, max_level - min_level], the boxes of all images in order. Boxes too large or too small use the
        nearest level; empty and inside-out boxes use the finest.
    """
    x1, y1, x2, y2 = torch.cat(list(boxes)).unbind(dim=1)
    # An inside-out box can have a negative area, whose square root is NaN; torchvision would then choose no level at
    # all.
    sides = torch.nan_to_num(((x2 - x1) * (y2 - y1)).sqrt())
    # The 1e-6 is torchvision's: rounding must not move a box of exactly the canonical scale one level down.
    levels = torch.floor(
        _CANONICAL_LEVEL + torch.log2(sides / _CANONICAL_SCALE) + torch.tensor(1e-6, dtype=sides.dtype)
    )
    return levels.clamp(min_level, max_level).to(torch.int64) - min_level


def multi_scale(
    op: Callable[..., Tensor],
    features: Sequence[Tensor],
    boxes: Sequence[Tensor],
    output_size: int | Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    """Pool each box from its level with any operator of this package.

    Args:
        op: `op(feature, rois, output_size, spatial_scale)`: `roi_pool`, or `partial(roi_align, sampling_ratio=2)`.
        features: (N, C, H_k, W_k) for each level k, finest first.
        boxes: (L, 4) for each image, one image at least.
        output_size: passed to `op` unchanged.
        scales: `1 / stride` of each level.

    Returns:
        (K, C, h, w), the boxes of all images in order.

    Raises:
        ValueError: the number of scales is not the number of levels, or the scales span more levels than there are.
    """
    if not features or len(features) != len(scales):
        raise ValueError(f"expected one scale a feature level, got {len(features)} levels and scales {list(scales)}")
    rois = rois_of(boxes)
    if len(features) == 1:
        return op(features[0], rois, output_size, scales[0])
    min_level, max_level = round(-math.log2(scales[0])), round(-math.log2(scales[-1]))
    # MobileNetV3's two maps share one stride, so fewer levels than feature maps is valid; the other maps stay unused.
    if not 0 <= max_level - min_level < len(features):
        raise ValueError(f"expected scales from fine to coarse, each at most half of the last, got {list(scales)}")
    levels = assign_levels(boxes, min_level=min_level, max_level=max_level)
    order = torch.argsort(levels, stable=True)
    parts = torch.split(rois[order], torch.bincount(levels, minlength=len(features)).tolist())
    pooled = [
        op(feature, part, output_size, scale) for feature, part, scale in zip(features, parts, scales, strict=True)
    ]
    # `cat` puts the boxes level by level; the inverse permutation restores the caller's order.
    return torch.cat(pooled)[torch.argsort(order)]
