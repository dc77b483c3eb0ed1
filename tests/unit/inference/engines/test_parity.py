"""Every engine answers as the plain network does, whatever the family, the sizes, the options and the batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from service.devices import device_named
from service.errors import ServiceError
from service.inference.engines.choosing import put_engine
from service.inference.engines.compiled import CompiledNetwork
from service.inference.engines.folding import fold
from service.inference.predictor import Predictor
from service.structures import Detections, DetectOptions, Query
from service.training.loop import evaluation_info
from tests.unit.inference.engines.networks import FAMILIES, config_of, network, picture

ENGINES = ("eager", "openvino", "compiled")
SIZES = [(120, 200), (97, 61), (1, 1), (1, 3000), (40, 150)]


@cache
def plain(family: str) -> Predictor:
    """The reference: torchvision's modules as they are."""
    return Predictor(network(family), info=evaluation_info(config_of(family)), device=torch.device("cpu"))


@cache
def run_by(engine: str, family: str, cache_dir: Path) -> Predictor:
    model = network(family)
    if engine == "openvino":
        pytest.importorskip("openvino")
    if engine == "compiled":  # without code generation, for which there is no time: what is tested is the wiring
        fold(model)
        model.parts = CompiledNetwork(model, backend="eager").parts()
    else:
        device = device_named("cpu")
        used = put_engine(model, engine=engine, device=device, precision="float32", key=family, cache_dir=cache_dir)
        assert used.engine == engine
    return Predictor(model, info=evaluation_info(config_of(family)), device=torch.device("cpu"))


def answers(predictor: Predictor, queries: Sequence[Query]) -> list[Detections]:
    return [prediction.detections for prediction in predictor.predict(queries)]


def assert_same(found: Detections, expected: Detections, *, scale: float = 1) -> None:
    """Equal as sets: two detections whose scores differ by less than rounding may come in either order.

    Boxes to 1e-3 pixels of the resized image, one of which has `scale` pixels of the original.
    """
    assert len(found) == len(expected)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    assert (found.masks is None) == (expected.masks is None)
    for index in range(len(expected)):
        near = (np.abs(found.boxes - expected.boxes[index]).max(axis=1) <= 1e-3 * scale) & (
            found.labels == expected.labels[index]
        )
        assert near.any()
        if found.masks is not None and expected.masks is not None:
            assert np.abs(found.masks[near] - expected.masks[index]).max(axis=(1, 2)).min() <= 1e-3


@pytest.mark.parametrize(
    ("engine", "family"),
    [
        *((engine, family) for engine in ("eager", "openvino") for family in FAMILIES),
        ("compiled", "fpn with masks"),
        ("compiled", "mobilenet"),
    ],
)
def test_pictures_of_all_sizes_get_the_plain_networks_answers(engine: str, family: str, cache_dir: Path) -> None:
    found = 0
    for size in SIZES:
        query = Query(picture(*size), DetectOptions(score_thresh=0.0))
        (expected,), (ours,) = answers(plain(family), [query]), answers(run_by(engine, family, cache_dir), [query])
        assert_same(ours, expected, scale=max(1, max(size) / 96))
        found += len(ours)
    assert found >= 20


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_mixed_options_gets_the_answers_of_each_alone(engine: str, cache_dir: Path) -> None:
    predictor = run_by(engine, "fpn with masks", cache_dir)
    proposals = ((10.0, 10.0, 90.0, 60.0), (50.0, 20.0, 150.0, 110.0))
    wishes = [
        DetectOptions(),
        DetectOptions(with_masks=False),
        DetectOptions(score_thresh=1.0),
        DetectOptions(label_ids=frozenset({2}), max_detections=3),
        DetectOptions(proposals=proposals, score_thresh=0.0),
        DetectOptions(proposals=()),
        DetectOptions(score_thresh=0.0, max_detections=1),
        DetectOptions(score_thresh=0.0),
    ]
    queries = [Query(picture(120, 200, seed=seed), wish) for seed, wish in enumerate(wishes)]
    together = answers(predictor, queries)
    assert [len(one) == 0 for one in together] == [False, False, True, False, False, True, False, False]
    assert together[1].masks is None
    for query, among in zip(queries, together, strict=True):
        (alone,), (expected,) = answers(predictor, [query]), answers(plain("fpn with masks"), [query])
        assert_same(among, alone)
        assert_same(alone, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_found_is_an_answer(engine: str, cache_dir: Path) -> None:
    nothing = Query(picture(120, 200), DetectOptions(score_thresh=1.0))
    (found,) = answers(run_by(engine, "fpn with masks", cache_dir), [nothing])
    assert found.boxes.shape == (0, 4)
    assert found.masks is not None
    assert found.masks.shape == (0, 28, 28)


def test_proposals_of_the_caller_leave_the_rpn_out(cache_dir: Path) -> None:
    predictor = run_by("openvino", "fpn with masks", cache_dir)
    given = Query(picture(120, 200), DetectOptions(proposals=((10.0, 10.0, 90.0, 60.0),), score_thresh=0.0))
    parts = predictor._model.parts
    assert parts is not None
    with patch.object(predictor._model.rpn, "propose", side_effect=AssertionError):
        (ours,), (expected,) = answers(predictor, [given]), answers(plain("fpn with masks"), [given])
    assert_same(ours, expected)


def test_the_engine_without_its_extra_is_refused_with_what_to_install() -> None:
    with (
        no_extra(),
        pytest.raises(ServiceError, match="pip install openvino"),
    ):
        put("openvino")


def test_auto_does_without_an_engine_that_is_not_there() -> None:
    with no_extra():
        assert put("auto") == "eager"


def test_without_a_home_the_missing_folder_is_named() -> None:
    pytest.importorskip("openvino")
    homeless = patch.object(Path, "home", side_effect=RuntimeError("Could not determine home directory."))
    with homeless, pytest.raises(ServiceError, match="ROISERVE_ENGINE_CACHE_DIR"):
        put("openvino")


def test_openvino_does_not_take_float16() -> None:
    pytest.importorskip("openvino")
    with pytest.raises(ServiceError, match="float32 or bfloat16"):
        put("openvino", precision="float16")
    assert put("auto", precision="float16") == "eager"


@pytest.mark.parametrize("capabilities", [["FP32", "BF16"], ["FP32", "INT8"]])
def test_bfloat16_needs_a_processor_that_has_it(capabilities: list[str], tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    real = openvino.Core.get_property

    def said(core: object, device: str, name: str) -> object:
        return capabilities if name == "OPTIMIZATION_CAPABILITIES" else real(core, device, name)

    with patch.object(openvino.Core, "get_property", said):
        if "BF16" in capabilities:
            assert put("openvino", precision="bfloat16", cache_dir=tmp_path) == "openvino"
        else:
            with pytest.raises(ServiceError, match="native bfloat16"):
                put("openvino", precision="bfloat16")
            assert put("auto", precision="bfloat16") == "eager"


def no_extra() -> AbstractContextManager[object]:
    """As if OpenVINO was not installed."""
    return patch("importlib.util.find_spec", return_value=None)


def put(engine: str, *, precision: str = "float32", cache_dir: Path | None = None) -> str:
    return put_engine(
        network("fpn with masks"),
        engine=engine,
        device=device_named("cpu"),
        precision=precision,
        key="a network",
        cache_dir=cache_dir,
    ).engine
