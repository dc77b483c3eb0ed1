"""RoI poolers: cut a fixed-size patch of features for every proposal. Knows feature maps and boxes; knows nothing of
classes or losses.

Shapes: R proposals of the whole batch, C channels, S x S output size, B bins of all grids of a spatial pyramid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from service.devices import device_of
from service.modeling.config import RoIConfig
from service.ops import assign_levels, multi_scale, roi_align, roi_align_max, roi_pool, roi_warp, spp
from service.ops._cpu_kernels import (
    OutputMemory,
    multi_scale_roi_align_channels_last,
    multi_scale_roi_pool_channels_last,
)
from service.ops.rois import as_rois, check_adaptive, rois_of


class RoIPooler(nn.Module):
    """Pool every box from the pyramid level that suits its size, with the configured operator.

    torchvision's `MultiScaleRoIAlign` infers the scales from the first batch, which is wrong for tiny images; here they
    are given.

    Args:
        roi: the operator and its parameters.
        output_size: S; for `spp` the sides of its grids.
        strides: stride of each feature map to pool from, by name, finest first.
    """

    def __init__(self, *, roi: RoIConfig, output_size: int | Sequence[int], strides: Mapping[str, int]) -> None:
        super().__init__()
        self.roi = roi
        self.output_size = output_size
        self.strides = dict(strides)
        self._op = _operator(roi)
        self._memory = OutputMemory()

    def forward(
        self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Pool all boxes of a batch.

        Args:
            features: (N, C, H / stride, W / stride) by name.
            boxes: (L, 4) for each image, in pixels of the resized image.
            image_sizes: not used; torchvision's heads pass it.

        Returns:
            (R, C, S, S), or (R, C, B, 1) for `spp`; the boxes of all images in order.
        """
        maps = [features[name] for name in self.strides]
        scales = [1 / stride for stride in self.strides.values()]
        # Our kernels have no gradients.
        kernels = None if torch.is_grad_enabled() else device_of(maps[0].device).kernels
        if (
            kernels == "numba"
            and self.roi.op in ("roi_pool", "roi_align")
            and all(one.dtype == torch.float32 for one in maps)
        ):
            return self._pool_by_numba(maps, boxes, scales)
        if kernels == "triton" and self.roi.op == "roi_align":
            return self._pool_by_triton(maps, boxes, scales)
        return multi_scale(self._op, maps, boxes, self.output_size, scales)

    def _pool_by_numba(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
        assert isinstance(self.output_size, int)  # only spp has grids
        rois = as_rois(list(boxes), maps[0], 1.0)
        levels = _levels(boxes, scales)
        size = (self.output_size, self.output_size)
        if self.roi.op == "roi_pool":
            return multi_scale_roi_pool_channels_last(maps, rois, levels, scales, size, memory=self._memory)
        if self.roi.sampling_ratio == 0:
            for level, (one, scale) in enumerate(zip(maps, scales, strict=True)):
                check_adaptive(rois[levels == level] * scale, one)
        return multi_scale_roi_align_channels_last(
            maps, rois, levels, scales, size, self.roi.sampling_ratio, self.roi.aligned, memory=self._memory
        )

    def _pool_by_triton(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
        # Imported here: Triton comes with PyTorch for CUDA on Linux only.
        from service.ops._cuda_kernels import multi_scale_roi_align

        assert isinstance(self.output_size, int)  # only spp has grids
        return multi_scale_roi_align(
            maps,
            rois_of(boxes),
            _levels(boxes, scales),
            scales,
            self.output_size,
            self.roi.sampling_ratio,
            self.roi.aligned,
        )

    def extra_repr(self) -> str:
        """Extra information for `print(model)`."""
        return f"op={self.roi.op}, output_size={self.output_size}, strides={self.strides}"


def _levels(boxes: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    finest = round(-math.log2(scales[0]))
    return assign_levels(boxes, min_level=finest, max_level=finest + len(scales) - 1)


def _operator(roi: RoIConfig) -> Callable[..., Tensor]:
    """The configured operator as a function of (feature, rois, output_size, spatial_scale)."""
    if roi.op == "roi_pool":
        return roi_pool
    if roi.op == "spp":
        return spp
    interpolating = {"roi_align": roi_align, "roi_align_max": roi_align_max, "roi_warp": roi_warp}
    return partial(interpolating[roi.op], sampling_ratio=roi.sampling_ratio, aligned=roi.aligned)
