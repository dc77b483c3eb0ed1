"""What engines do with what only some networks have: crops instead of a trunk, another operator for a request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.devices import device_named
from service.errors import ServiceError
from service.inference.engines.choosing import put_engine
from service.inference.predictor import Predictor
from service.modeling.build import build_model
from service.structures import DetectOptions, Query
from service.training.loop import evaluation_info
from tests.tiny_models import given_proposals
from tests.unit.inference.engines.networks import config_of, network, picture

CPU = torch.device("cpu")
FAMILY = "fpn with masks"


def put(model: Any, engine: str, *, cache_dir: Path | None = None) -> str:
    device = device_named("cpu")
    return put_engine(model, engine=engine, device=device, precision="float32", key=FAMILY, cache_dir=cache_dir).engine


def test_r_cnn_is_run_by_eager_where_the_engine_is_left_open_and_refused_to_others() -> None:
    model = build_model(given_proposals("rcnn")).eval()
    for engine in ("openvino", "compiled"):
        if engine == "openvino":
            pytest.importorskip("openvino")
        with pytest.raises(ServiceError, match="does not run R-CNN"):
            put(model, engine)
    assert put(model, "auto") == "eager"
    assert model.parts is None


@pytest.mark.parametrize("engine", ["eager", "openvino"])
@pytest.mark.parametrize("op", ["roi_pool", "roi_align_max", "roi_warp"])
def test_another_operator_for_a_request_reaches_both_branches_of_any_engine(
    engine: str, op: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    model, config = network(FAMILY), config_of(FAMILY)
    put(model, engine, cache_dir=tmp_path_factory.getbasetemp() / "engines")
    plain, ours = (Predictor(one, info=evaluation_info(config), device=CPU) for one in (network(FAMILY), model))
    query = Query(picture(120, 200), DetectOptions(score_thresh=0.0, roi_op=op))
    (expected,), (found,) = ([one.detections for one in predictor.predict([query])] for predictor in (plain, ours))
    assert len(found) == len(expected) >= 10
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=2e-3)
    assert found.masks is not None
    assert expected.masks is not None
    np.testing.assert_allclose(found.masks, expected.masks, atol=1e-3)
