"""Choosing proposals and detections waits for the device a fixed number of times a batch, whatever its size: what a CPU
can show of it is how often sizes are read that only the device knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.modeling.roi_heads import Selection

CONFIG = ModelConfig.model_validate(
    {
        "architecture": "faster_rcnn",
        "labels": ["a", "b"],
        "backbone": {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16, "norm": "batch_norm"},
        "roi": {"box_head_channels": 32},
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

    # A tensor of the CPU becomes a list without an operation.
    with Waits() as waits, patch.object(Tensor, "tolist", tolist):  # type: ignore[no-untyped-call]  # torch's base
        yield waits


@pytest.mark.parametrize("num_images", [1, 5])
def test_a_batch_waits_once_for_its_proposals_and_twice_for_its_detections(num_images: int) -> None:
    torch.manual_seed(0)
    model = build_model(CONFIG).eval()
    sizes = [(64, 96)] * num_images
    counted = []
    with torch.inference_mode():
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
    assert counted == [1, 2]
