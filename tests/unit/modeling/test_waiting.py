"""A batch waits for the device a fixed number of times, whatever its size: what a CPU can show of it is how often sizes
and numbers are read that only the device knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from service.devices.cpu import CpuDevice
from service.inference.predictor import _to_host
from service.modeling import poolers
from service.modeling import rpn as modeling_rpn
from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.modeling.poolers import RoIPooler
from service.modeling.roi_heads import Selection
from service.ops import nms
from service.ops._cpu_kernels import multi_scale_roi_align_channels_last
from service.ops.rois import rois_of
from service.structures import Detections

CONFIG = ModelConfig.model_validate(
    {
        "architecture": "faster_rcnn",
        "labels": ["a", "b"],
        "backbone": {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16, "norm": "batch_norm"},
        "roi": {"box_head_channels": 32},
    }
)
MASK_CONFIG = ModelConfig.model_validate(
    CONFIG.model_dump(mode="json", exclude_unset=True)
    | {
        "architecture": "mask_rcnn",
        "transform": {"min_size": 64, "max_size": 96},
        "roi": {"box_head_channels": 32, "mask_head_channels": [16]},
    }
)
GRIDS = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
ANCHORS = 3 * sum(height * width for height, width in GRIDS)
WAITS = {
    torch.ops.aten.nonzero.default,
    torch.ops.aten.nonzero_numpy.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.item.default,
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.bincount.default,
}


class Waits(TorchDispatchMode):
    """Counts the operations whose result has a size, or is a number, that only the device knows."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.ops.aten.index.Tensor and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        self.count += func in WAITS or by_mask
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_waits() -> Iterator[Waits]:
    def tolist(tensor: Tensor) -> Any:
        waits.count += 1
        return tensor.numpy().tolist()

    def cpu(tensor: Tensor) -> Tensor:
        waits.count += 1
        return tensor

    # A tensor of the CPU becomes a list, and one of the CPU, without an operation.
    waits = Waits()  # type: ignore[no-untyped-call]  # torch's base
    with waits, patch.object(Tensor, "tolist", tolist), patch.object(Tensor, "cpu", cpu):
        yield waits


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """The way that a batch takes there, with our CPU's kernels in the place of Triton's, which do not wait either."""

    def pool(pooler: RoIPooler, maps: Sequence[Tensor], boxes: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
        assert isinstance(pooler.output_size, int)
        levels, size = poolers._levels(boxes, scales), (pooler.output_size, pooler.output_size)
        return multi_scale_roi_align_channels_last(maps, rois_of(boxes), levels, scales, size, 2, False)

    with ExitStack() as patches:
        patches.enter_context(patch.object(CpuDevice, "runs_ahead", True))
        patches.enter_context(patch.object(CpuDevice, "kernels", "triton"))
        patches.enter_context(patch.object(nms, "_suppress", nms._suppress_by_numba))
        patches.enter_context(patch.object(RoIPooler, "_pool_by_triton", pool))
        yield


@pytest.mark.parametrize("num_images", [1, 5])
def test_on_cuda_a_whole_batch_with_masks_waits_three_times(num_images: int) -> None:
    """For the candidates, for the number of detections, and for the answer, which is the one on the CPU."""
    torch.manual_seed(0)
    model = build_model(MASK_CONFIG).eval()
    images = [torch.randint(0, 256, (60 + index, 90, 3), dtype=torch.uint8) for index in range(num_images)]

    def answer() -> list[Detections]:
        detections, _ = _to_host(
            model.detect(
                images,
                [Selection(0.1, 10)] * num_images,
                with_masks=[True] * num_images,
                proposals=[None] * num_images,
            ),
            CpuDevice("cpu"),
        )
        return detections

    expected = answer()
    with as_on_cuda(), counted_waits() as waits:
        found = answer()
    assert waits.count == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == 10
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-4)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        assert ours.masks is not None
        assert theirs.masks is not None
        np.testing.assert_allclose(ours.masks, theirs.masks, atol=1e-5)


@pytest.mark.parametrize("num_images", [1, 5])
def test_on_cuda_a_batch_never_waits_for_its_proposals_and_twice_for_its_detections(num_images: int) -> None:
    torch.manual_seed(0)
    model = build_model(CONFIG).eval()
    sizes = [(64, 96)] * num_images
    counted = []
    with as_on_cuda(), torch.inference_mode():
        with counted_waits() as waits:
            proposals = model.rpn.propose(
                torch.randn(num_images, ANCHORS),
                torch.randn(num_images, ANCHORS, 4),
                padded_size=(64, 96),
                grid_sizes=GRIDS,
                image_sizes=sizes,
            )
        counted.append(waits.count)
        rows = sum(map(len, proposals))
        with counted_waits() as waits:
            found = model.roi_heads._select(
                torch.rand(rows, 3), torch.randn(rows, 12), proposals, sizes, [Selection(0.1, 10)] * num_images
            )
        counted.append(waits.count)
    assert [len(one.boxes) for one in found] == [10] * num_images
    assert counted == [0, 2]


def test_anchors_of_more_sizes_than_a_server_sees_are_laid_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rpn = build_model(CONFIG).eval().rpn
    laid = []
    generator = type(rpn.anchor_generator)
    lay = generator.grid_anchors

    def grid_anchors(*args: Any) -> list[Tensor]:
        laid.append(args)
        anchors: list[Tensor] = lay(*args)
        return anchors

    def use(width: int) -> Tensor:
        return rpn.lay_anchors((64, 32 * width), [(16, 8 * width), (8, 4 * width), *GRIDS[2:]], torch.device("cpu"))

    monkeypatch.setattr(generator, "grid_anchors", grid_anchors)
    first = [use(width) for width in range(1, 41)]
    assert all(use(width) is one for width, one in zip(range(1, 41), first, strict=True))
    assert len(laid) == 40
    # Beyond the limit the sizes that were not used for longest go.
    monkeypatch.setattr(modeling_rpn, "_MOST_ANCHOR_BYTES", 3 * first[-1].nbytes)
    for width, expected in [(50, 41), (40, 41), (50, 41), (1, 42)]:
        use(width)
        assert len(laid) == expected
