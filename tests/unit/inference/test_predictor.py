"""Proposals of the caller are classified and refined as the RPN's own are, and the RPN runs only for who needs it;
another RoI operator gives what a model that was built with it gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torchvision.models.detection.transform import resize_boxes

from service.devices.cpu import CpuDevice
from service.errors import InferenceError, OutOfMemoryError
from service.inference.loading import describe, interchangeable_ops
from service.inference.predictor import Predictor
from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.structures import Box, Detections, DetectOptions, Image, Query, UInt8Array
from service.training.loop import evaluation_info
from tests.tiny_models import given_proposals

CONFIG = ModelConfig.model_validate(
    {
        "architecture": "mask_rcnn",
        "labels": ["a", "b"],
        "backbone": {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16, "norm": "batch_norm"},
        "transform": {"min_size": 160, "max_size": 320},
        "rpn": {"post_nms_top_n_test": 50},
        "roi": {"box_head_channels": 32, "mask_head_channels": [16]},
        "detections": {"score_thresh": 0.0, "detections_per_img": 20},
    }
)


def build(config: ModelConfig) -> Predictor:
    torch.manual_seed(0)
    model = build_model(config)
    # Random weights find all classes equally likely; spread them so that rounding does not decide which comes first.
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(50)
    return Predictor(model, info=evaluation_info(config), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return build(CONFIG)


def picture(seed: int, height: int = 120, width: int = 200) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class CopiedAhead:
    def __init__(self, pixels: UInt8Array) -> None:
        self._copy: torch.Tensor | None = torch.from_numpy(pixels)

    def take(self) -> torch.Tensor | None:
        copy, self._copy = self._copy, None
        return copy


def test_pixels_that_were_copied_ahead_are_not_copied_again_unless_a_batch_is_tried_again(predictor: Predictor) -> None:
    expected = detect(predictor, Query(picture(1)), Query(picture(2)))
    assert predictor.begin_upload(picture(1)).upload is None  # a CPU copies nothing
    copied = []

    def upload(device: CpuDevice, tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.dtype)
        return tensor

    with (
        patch.object(CpuDevice, "begin_upload", lambda device, pixels: CopiedAhead(pixels)),
        patch.object(CpuDevice, "upload", upload),
    ):
        queries = [Query(predictor.begin_upload(picture(1))), Query(picture(2))]
        for tried in (1, 2):
            found = detect(predictor, *queries)
            assert copied.count(torch.uint8) == {1: 1, 2: 3}[tried]
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_array_equal(ours.boxes, theirs.boxes)


@contextmanager
def rpn_runs(predictor: Predictor) -> Iterator[list[list[torch.Tensor]]]:
    """Collects the proposals of each run of the RPN."""
    runs: list[list[torch.Tensor]] = []
    rpn = predictor._model.rpn
    propose = rpn.propose

    def noted(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        runs.append(propose(*args, **kwargs))
        return runs[-1]

    with patch.object(rpn, "propose", noted):
        yield runs


def detect(predictor: Predictor, *queries: Query) -> list[Detections]:
    return [prediction.detections for prediction in predictor.predict(queries)]


def own_proposals(predictor: Predictor, image: Image) -> tuple[Detections, tuple[Box, ...]]:
    """The ordinary answer, and the RPN's proposals behind it in pixels of the image."""
    with rpn_runs(predictor) as runs:
        (found,) = detect(predictor, Query(image))
    resized = predictor._model.transform.resized_size(image.size)
    boxes = resize_boxes(runs[0][0], list(resized), list(image.size)).tolist()
    return found, tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in boxes)


def assert_same(found: Detections, expected: Detections) -> None:
    assert len(found) == len(expected)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    assert found.masks is not None
    assert expected.masks is not None
    np.testing.assert_allclose(found.masks, expected.masks, atol=1e-4)


def test_the_rpns_own_proposals_passed_by_the_caller_give_the_ordinary_answer(predictor: Predictor) -> None:
    image = picture(0)
    expected, proposals = own_proposals(predictor, image)
    assert len(proposals) == 50
    with rpn_runs(predictor) as runs:
        (found,) = detect(predictor, Query(image, DetectOptions(proposals=proposals)))
    assert runs == []
    assert len(found) >= 10
    assert_same(found, expected)


def test_one_batch_mixes_images_with_and_without_proposals(predictor: Predictor) -> None:
    images = [picture(seed) for seed in range(4)]
    (first, given), (second, _), (third, also_given), (last, _) = (own_proposals(predictor, one) for one in images)
    options = [DetectOptions(proposals=given), DetectOptions(), DetectOptions(proposals=also_given), DetectOptions()]
    with rpn_runs(predictor) as runs:
        found = detect(predictor, *(Query(image, wish) for image, wish in zip(images, options, strict=True)))
    assert [len(proposals) for proposals in runs] == [2]
    for one, expected in zip(found, (first, second, third, last), strict=True):
        assert_same(one, expected)


@pytest.mark.parametrize("with_masks", [True, False])
def test_no_proposals_no_detections(predictor: Predictor, with_masks: bool) -> None:
    nothing = Query(picture(0), DetectOptions(proposals=(), with_masks=with_masks))
    (alone,) = detect(predictor, nothing)
    beside, other = detect(predictor, nothing, Query(picture(1)))
    assert (len(alone), len(beside)) == (0, 0)
    assert len(other) > 0


def test_proposals_are_clipped_to_the_image(predictor: Predictor) -> None:
    image = picture(0, height=120, width=200)
    beyond = DetectOptions(proposals=((-1e300, -5.0, 100.0, 60.0), (50.0, 30.0, 1e300, 1e300)))
    inside = DetectOptions(proposals=((0.0, 0.0, 100.0, 60.0), (50.0, 30.0, 200.0, 120.0)))
    (found,), (expected,) = detect(predictor, Query(image, beyond)), detect(predictor, Query(image, inside))
    assert len(found) > 0
    assert_same(found, expected)


def test_proposal_beside_the_image_is_left_out(predictor: Predictor) -> None:
    image = picture(0, height=120, width=200)
    beside = DetectOptions(proposals=((200.0, 0.0, 300.0, 60.0), (-9.0, -9.0, 0.0, 0.0)))
    assert len(detect(predictor, Query(image, beside))[0]) == 0


@pytest.mark.parametrize("op", [op for op in interchangeable_ops(CONFIG) if op != CONFIG.roi.op])
def test_another_roi_op_answers_as_a_model_built_with_it(predictor: Predictor, op: str) -> None:
    roi = CONFIG.roi.model_copy(update={"op": op})
    (expected,) = detect(build(CONFIG.model_copy(update={"roi": roi})), Query(picture(0)))
    (found,) = detect(predictor, Query(picture(0), DetectOptions(roi_op=op)))
    assert_same(found, expected)
    (own,) = detect(predictor, Query(picture(0)))
    assert not np.array_equal(found.scores, own.scores)


def test_heads_that_fit_no_other_operator_have_none_to_choose_from() -> None:
    pyramid = CONFIG.roi.model_copy(update={"op": "spp"})
    assert interchangeable_ops(CONFIG.model_copy(update={"roi": pyramid})) == ()
    assert "roi_pool" in interchangeable_ops(CONFIG)
    assert "roi_warp" in interchangeable_ops(CONFIG)
    adaptive = CONFIG.roi.model_copy(update={"sampling_ratio": 0})  # RoI Warp needs a number of points
    assert "roi_warp" not in interchangeable_ops(CONFIG.model_copy(update={"roi": adaptive}))


def test_batch_of_two_operators_is_refused(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="one roi_op"):
        predictor.predict([Query(picture(0)), Query(picture(0), DetectOptions(roi_op="roi_pool"))])


def test_lack_of_memory_is_told_apart_from_other_failures_and_names_the_sizes(predictor: Predictor) -> None:
    queries = [Query(picture(0)), Query(picture(1, 64, 48))]
    lack = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    named = pytest.raises(OutOfMemoryError, match=r"not enough memory for a batch of 2 \(200x120, 48x64\).*2.00 GiB")
    with patch.object(predictor._model, "detect", side_effect=lack), named:
        predictor.predict(queries)
    broken = patch.object(predictor._model, "detect", side_effect=RuntimeError("broken"))
    with broken, pytest.raises(InferenceError, match="broken") as failure:
        predictor.predict(queries)
    assert not isinstance(failure.value, OutOfMemoryError)
    predictor.release_memory()
    assert len(predictor.predict(queries)) == 2


@pytest.mark.parametrize("architecture", ["fast_rcnn", "rcnn"])
def test_warming_up_brings_its_own_proposals_where_the_model_has_none(architecture: str) -> None:
    config = given_proposals(architecture)
    info = describe(config, name="given", version=1, precision="float32", device="cpu")
    predictor = Predictor(build_model(config), info=info, device=torch.device("cpu"))
    assert info.needs_proposals
    heads = predictor._model.roi_heads
    with patch.object(heads, "detect_boxes", wraps=heads.detect_boxes) as detect_boxes:
        predictor.warm_up()
    (call,) = detect_boxes.call_args_list
    assert len(call.args[1][0]) == 1


def test_class_scores_come_with_the_detections_of_the_image_that_asks(predictor: Predictor) -> None:
    asking = DetectOptions(extras=("class_scores",))
    plain, asked = detect(predictor, Query(picture(1)), Query(picture(1), asking))
    assert dict(plain.extras) == {}
    assert np.array_equal(asked.boxes, plain.boxes)
    class_scores = asked.extras["class_scores"]
    assert class_scores.shape == (len(asked), 3)  # the background and two labels
    assert np.allclose(class_scores.sum(axis=1), 1, atol=1e-6)
    assert np.array_equal(class_scores[np.arange(len(asked)), asked.labels], asked.scores)
    assert len(asked) > 5
    (none,) = detect(predictor, Query(picture(1), DetectOptions(extras=("class_scores",), score_thresh=1.0)))
    assert none.extras["class_scores"].shape == (0, 3)
