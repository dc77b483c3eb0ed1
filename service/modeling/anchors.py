"""Anchors in the style of detectron2 and mmdetection. torchvision's own generator needs no wrapper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator


class UnroundedAnchorGenerator(AnchorGenerator):
    """torchvision's generator without its two roundings: of the anchors' corners to whole pixels, and of the maps'
    strides, which torchvision computes as image size // map size (800 // 13 = 61 for the coarsest map, whose stride is
    64).

    By default the anchors of a location are ordered by size, then ratio, like detectron2's; torchvision and mmdetection
    order them by ratio, then size. The order has to match the RPN head's channels.

    Args:
        by_ratio: whether to order them by ratio first.
        sizes: for every feature map, the square roots of the anchors' areas, in pixels of the resized image.
        aspect_ratios: for every feature map, height / width.
        strides: of every feature map.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[Sequence[float]],
        *,
        strides: Sequence[int],
        by_ratio: bool = False,
    ) -> None:
        self.strides = strides
        self.by_ratio = by_ratio
        super().__init__(sizes, aspect_ratios)  # type: ignore[no-untyped-call]  # torchvision has no annotation

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        """The anchors of one location of a map.

        Args:
            scales: square roots of their areas, in pixels of the resized image.
            aspect_ratios: height / width.
            dtype: of the result.
            device: of the result.

        Returns:
            (len(scales) * len(aspect_ratios), 4) as (x1, y1, x2, y2), centred on the origin.
        """
        half_sides = torch.tensor(scales, dtype=dtype, device=device)[:, None] / 2
        roots = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        half_widths, half_heights = half_sides / roots, half_sides * roots
        corners = torch.stack([-half_widths, -half_heights, half_widths, half_heights], dim=2)
        return (corners.transpose(0, 1) if self.by_ratio else corners).flatten(end_dim=1)

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        """Lay the anchors of one location over every feature map.

        Args:
            grid_sizes: (height, width) of every map.
            strides: torchvision's estimate; only its device is used.

        Returns:
            (height * width * anchors per location, 4) for each map, as (x1, y1, x2, y2) in pixels of the batch.
        """
        device = strides[0][0].device
        return super().grid_anchors(grid_sizes, [[torch.tensor(stride, device=device)] * 2 for stride in self.strides])
