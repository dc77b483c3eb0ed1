"""The path of fixed sizes answers as the usual one, and waits for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from service.devices.cpu import CpuDevice
from service.devices.cuda import CudaDevice
from service.modeling import poolers
from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.modeling.fixed_sizes import FixedDetections, Wanted, detect_fixed
from service.modeling.generalized_rcnn import GeneralizedRCNN, ImageDetections
from service.modeling.poolers import RoIPooler
from service.modeling.roi_heads import Selection
from service.ops import nms
from tests.unit.modeling.test_waiting import MASK_CONFIG, as_on_cuda, counted_waits

CLASSES = 3
MOST = 20


DETECTRON2S = ModelConfig.model_validate(
    MASK_CONFIG.model_dump(mode="json", exclude_unset=True)
    | {"transform": {"min_size": 64, "max_size": 96, "style": "detectron2"}}
)


def network(config: ModelConfig = MASK_CONFIG) -> GeneralizedRCNN:
    torch.manual_seed(0)
    model = build_model(config).eval()
    # Scores apart from each other, so that thresholds and suppression have something to choose.
    model.roi_heads.box_predictor.cls_score.weight.data *= 20
    model.roi_heads.box_predictor.bbox_pred.weight.data *= 5
    return model


MODEL = network()
PICTURES = [
    torch.randint(0, 256, (60 + index, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
    for index in range(4)
]


def usual(selections: Sequence[Selection], model: GeneralizedRCNN = MODEL) -> list[ImageDetections]:
    count = len(selections)
    with as_on_cuda():
        return model.detect(PICTURES[:count], selections, with_masks=[True] * count, proposals=[None] * count)


def fixed(
    selections: Sequence[Selection], model: GeneralizedRCNN = MODEL, *, capacity: int = 4096, with_masks: bool = True
) -> FixedDetections:
    images = PICTURES[: len(selections)]
    with as_on_cuda():
        batch = model.transform.prepare(images)
        wanted = Wanted.of(
            selections,
            heads=model.roi_heads,
            resized=[(height, width) for height, width in batch.image_sizes],
            original=[(image.shape[0], image.shape[1]) for image in images],
        )
        # Nor does it copy anything from the host, which a graph would read again at each replay.
        upload = patch.object(CpuDevice, "upload", side_effect=AssertionError("a copy from the host"))
        with counted_waits() as waits, upload:
            found = detect_fixed(
                model, batch.tensors, wanted, capacity=capacity, max_detections=MOST, with_masks=with_masks
            )
    assert waits.count == 0
    return found


def assert_equal(found: FixedDetections, expected: Sequence[ImageDetections]) -> None:
    assert found.fit.all()
    assert found.masks is not None
    for index, one in enumerate(expected):
        count = int(found.counts[index])
        assert count == len(one.boxes)
        for ours, theirs in (
            (found.boxes[index], one.boxes),
            (found.labels[index], one.labels),
            (found.scores[index], one.scores),
        ):
            torch.testing.assert_close(ours[:count], theirs, rtol=0, atol=0)
            assert not ours[count:].any()
        assert one.masks is not None
        # Products of other numbers of rows are rounded differently.
        torch.testing.assert_close(found.masks[index, :count], one.masks, rtol=0, atol=1e-5)


SELECTIONS = st.builds(
    Selection,
    score_thresh=st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.9, 1.0]),
    detections_per_img=st.sampled_from([1, 5, MOST]),
    labels=st.sampled_from([None, frozenset({1}), frozenset({2}), frozenset({0, 1, 2})]),
    nms_thresh=st.sampled_from([None, 0.1, 0.5, 0.9]),
    class_agnostic_nms=st.sampled_from([None, True, False]),
)


@settings(max_examples=20, deadline=None)
@given(st.lists(SELECTIONS, min_size=1, max_size=4))
def test_batches_of_mixed_options_are_answered_as_on_the_usual_path(selections: list[Selection]) -> None:
    assert_equal(fixed(selections), usual(selections))


def test_boxes_of_detectron2s_style_are_clipped_to_the_original_image_too() -> None:
    model = network(DETECTRON2S)
    selections = [Selection(0.0, MOST), Selection(0.3, MOST)]
    assert_equal(fixed(selections, model), usual(selections, model))


def test_an_image_with_more_candidates_than_the_capacity_is_told() -> None:
    selections = [Selection(0.0, MOST), Selection(0.0, MOST, labels=frozenset({1})), Selection(1.0, MOST)]
    found = fixed(selections, capacity=4096)
    many, fewer = (int(count) for count in torch.tensor([2, 1]) * _proposals())
    assert fixed(selections, capacity=fewer).fit.tolist() == [False, True, True]
    assert fixed(selections, capacity=many).fit.all()
    assert_equal(found, usual(selections))


def _proposals() -> Tensor:
    """How many proposals the first picture has, each with two candidates if every score is wanted."""
    with as_on_cuda(), torch.inference_mode():
        batch = MODEL.transform.prepare(PICTURES[:3])
        trunk = MODEL.own_parts().trunk(batch.tensors)
        proposals = MODEL.rpn.propose(
            trunk.objectness,
            trunk.deltas,
            padded_size=(batch.tensors.shape[2], batch.tensors.shape[3]),
            grid_sizes=[(one.shape[2], one.shape[3]) for one in trunk.features.values()],
            image_sizes=batch.image_sizes,
        )
    return torch.tensor(max(int((one[:, 2] > one[:, 0]).sum()) for one in proposals))


@pytest.mark.parametrize("with_masks", [True, False])
def test_sizes_do_not_depend_on_what_is_found(with_masks: bool) -> None:
    for thresh in (0.0, 1.0):
        found = fixed([Selection(thresh, 5)] * 2, with_masks=with_masks)
        assert found.boxes.shape == (2, MOST, 4)
        assert (None if found.masks is None else found.masks.shape) == ((2, MOST, 28, 28) if with_masks else None)


class FromTheHost(TorchDispatchMode):
    """Notes the operations that read a tensor of the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's base
        self.operations: set[object] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
        if any(one.device.type == "cpu" for one in tensors):
            self.operations.add(func)
            assert all(one.ndim == 0 for one in tensors if one.device.type == "cpu")
        return result


def test_on_cuda_nothing_is_copied_from_the_host() -> None:
    """A graph could not hold it. PyTorch's fake tensors go the way of a GPU's without one, and refuse operations whose
    result has a size that only the device knows.
    """

    def pool(pooler: RoIPooler, maps: Sequence[Tensor], boxes: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
        assert isinstance(pooler.output_size, int)
        levels = poolers._levels(boxes, scales)
        return maps[0].new_empty(len(levels), maps[0].shape[1], pooler.output_size, pooler.output_size)

    with (
        FakeTensorMode(),
        patch.object(CudaDevice, "kernels", "triton"),
        patch.object(CudaDevice, "upload", side_effect=AssertionError("a copy from the host")),
        patch.object(RoIPooler, "_pool_by_triton", pool),
        patch.object(nms, "_suppress", lambda boxes, groups, *rest: torch.zeros_like(groups, dtype=torch.bool)),
    ):
        with torch.device("cuda:0"):
            model = build_model(MASK_CONFIG).eval()
            batch, wanted = torch.empty(2, 3, 64, 96), torch.empty(2, 10 + CLASSES)
        # Without inference mode, in which operations that consist of others are not taken apart.
        detect: Any = detect_fixed.__wrapped__  # type: ignore[attr-defined]  # of the decorator
        with torch.no_grad():
            detect(model, batch, Wanted(wanted), capacity=64, max_detections=MOST, with_masks=True)  # lays the anchors
            with FromTheHost() as from_the_host:
                found = detect(model, batch, Wanted(wanted), capacity=64, max_detections=MOST, with_masks=True)
    assert found.masks.device.type == "cuda"
    # A number that is added is passed to the kernel by value.
    assert from_the_host.operations <= {torch.ops.aten.add.Tensor, torch.ops.aten.lift_fresh.default}
