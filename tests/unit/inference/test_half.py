"""Half precision casts the weights once, answers as float32 within its digits, and never takes an overflow for nothing
found. The same code runs on CUDA.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from service.devices import device_named
from service.inference.engines.choosing import put_engine
from service.inference.half import HalfNetwork, PrecisionError
from service.inference.loading import load_predictor
from service.inference.predictor import Predictor
from service.modeling.build import build_model
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.structures import Detections, DetectOptions, Query
from service.training.loop import evaluation_info
from tests.tiny_models import given_proposals, store_untrained
from tests.unit.inference.engines.networks import FAMILIES, config_of, network, picture

CPU = torch.device("cpu")
FAMILY = "fpn with masks"
QUERY = Query(picture(120, 200), DetectOptions(score_thresh=0.0, max_detections=10))


def half(model: GeneralizedRCNN, precision: str, *, family: str = FAMILY) -> Predictor:
    device = device_named("cpu")
    placed = put_engine(model, engine="eager", device=device, precision=precision, key="", cache_dir=None)
    info = replace(evaluation_info(config_of(family)), precision=precision)
    return Predictor(model, info=info, device=CPU, placed=placed)


def plain(model: GeneralizedRCNN) -> Predictor:
    return Predictor(model, info=evaluation_info(config_of(FAMILY)), device=CPU)


def answer(predictor: Predictor, query: Query = QUERY) -> Detections:
    (prediction,) = predictor.predict([query])
    return prediction.detections


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_with_weights_of_half_precision(family: str) -> None:
    model = network(family)
    predictor = half(model, "bfloat16", family=family)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            assert parameter.dtype == (torch.float32 if isinstance(module, _BatchNorm) else torch.bfloat16), name
    assert model.transform._mean.dtype == torch.float32
    (prediction,) = predictor.predict([QUERY])
    assert not prediction.overflowed
    assert len(prediction.detections) > 0
    assert np.isfinite(prediction.detections.boxes).all()


def test_r_cnn_runs_with_weights_of_half_precision() -> None:
    torch.manual_seed(0)
    config = given_proposals("rcnn")
    model = build_model(config).eval()
    placed = put_engine(model, engine="eager", device=device_named("cpu"), precision="bfloat16", key="", cache_dir=None)
    predictor = Predictor(model, info=evaluation_info(config), device=CPU, placed=placed)
    query = Query(picture(90, 120), DetectOptions(score_thresh=0.0, proposals=((10.0, 10.0, 60.0, 70.0),)))
    assert len(answer(predictor, query)) == 1
    assert {one.dtype for one in model.parameters()} <= {torch.bfloat16, torch.float32}


def test_answers_differ_from_float32_in_the_last_digits_of_half_precision_alone() -> None:
    expected, found = answer(plain(network(FAMILY))), answer(half(network(FAMILY), "float16"))
    assert len(found) == len(expected) == 10
    assert not np.array_equal(found.scores, expected.scores)
    np.testing.assert_allclose(found.scores, expected.scores, atol=0.01)


def explode(model: GeneralizedRCNN, scale: float) -> None:
    """Let the box head's hidden values grow beyond what float16 holds, and its answers stay what they were."""
    head = model.roi_heads
    first, last = head.box_head.fc7, head.box_predictor
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.weight.mul_(scale)
        first.bias.mul_(scale)
        for predictor in (last.cls_score, last.bbox_pred):
            predictor.weight.div_(scale)


def test_batch_that_overflows_runs_again_in_float32_and_says_so() -> None:
    model, same = network(FAMILY), network(FAMILY)
    for one in (model, same):
        explode(one, 1e4)
        with torch.no_grad():
            one.roi_heads.box_head.fc6.weight.mul_(1e2)  # in range, each of them, but not what they make together
            one.roi_heads.box_predictor.cls_score.weight.div_(1e2)
            one.roi_heads.box_predictor.bbox_pred.weight.div_(1e2)
    predictor = half(model, "float16")
    (prediction,) = predictor.predict([QUERY])
    assert prediction.overflowed
    expected = answer(plain(same))
    assert len(prediction.detections) == len(expected) == 10
    np.testing.assert_allclose(prediction.detections.scores, expected.scores, atol=0.01)
    twin = predictor._placed.half and predictor._placed.half.in_float32()
    predictor.predict([QUERY])
    assert predictor._placed.half is not None
    assert predictor._placed.half.in_float32() is twin  # made once
    # bfloat16 has float32's range.
    (prediction,) = half(same, "bfloat16").predict([QUERY])
    assert not prediction.overflowed


def test_outputs_of_a_batch_that_failed_count_for_no_other() -> None:
    """Whatever it computed, a capture that failed least of all: its tensors were never filled."""
    predictor = half(network(FAMILY), "bfloat16")
    assert predictor._placed.half is not None
    predictor._placed.half._check(torch.tensor(torch.inf))
    (prediction,) = predictor.predict([QUERY])
    assert not prediction.overflowed


def test_weights_too_large_for_the_format_are_refused_by_name_and_auto_takes_float32(tmp_path: Path) -> None:
    model = network(FAMILY)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight[0, 0] = 1e5
    with pytest.raises(PrecisionError, match=r"roi_heads\.box_predictor\.cls_score\.weight do not fit float16"):
        HalfNetwork(model, "float16")
    config = config_of(FAMILY)
    stored = store_untrained(tmp_path, "large", config)
    weights = stored.load_weights()
    weights["roi_heads.box_predictor.cls_score.weight"][0, 0] = 1e5
    from unittest.mock import patch

    from service.devices.cpu import CpuDevice
    from service.model_store.store import StoredModel

    with (
        patch.object(CpuDevice, "half_precision", "float16"),
        patch.object(CpuDevice, "fastest_engine", "eager"),
        patch.object(StoredModel, "load_weights", lambda self: dict(weights)),
    ):
        assert load_predictor(stored, device="cpu").info.precision == "float32"
        with pytest.raises(PrecisionError, match="large@1: the weights of"):
            load_predictor(stored, device="cpu", precision="float16")
