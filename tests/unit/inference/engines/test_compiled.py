"""The `compiled` engine compiles while it warms up, for all sizes at once, and never within a batch."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from service.inference.engines.choosing import Placed, keep_kernels
from service.inference.engines.compiled import CompiledNetwork, keep_compiled_code
from service.inference.engines.folding import fold
from service.inference.predictor import Predictor
from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.structures import DetectOptions, Query
from service.training.loop import evaluation_info
from tests.unit.inference.engines.networks import FAMILIES, SMALL, picture, weights_of
from tests.unit.inference.engines.test_parity import answers, assert_same

FAMILY = "fpn with masks"
# Large enough for the coarsest map, of stride 64, to have cells beside each other.
CONFIG = ModelConfig.model_validate(SMALL | FAMILIES[FAMILY] | {"transform": {"min_size": 128, "max_size": 192}})


class Backend:
    """Of `torch.compile`: runs what it is given as it is, and counts."""

    compiled = 0
    runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.compiled += 1

        def run(*values: Any) -> Any:
            self.runs += 1
            return graph(*values)

        return run


def network() -> GeneralizedRCNN:
    model = build_model(CONFIG)
    model.load_state_dict(weights_of(FAMILY))
    return model.eval()


def plain() -> Predictor:
    return Predictor(network(), info=evaluation_info(CONFIG), device=torch.device("cpu"))


def predictor_on(backend: Backend) -> Predictor:
    model = network()
    fold(model)
    compiled = CompiledNetwork(model, backend=backend)
    model.parts = compiled.parts()
    info = replace(evaluation_info(CONFIG), engine="compiled")
    placed = Placed("compiled", take_uncompiled=compiled.take_uncompiled)
    return Predictor(model, info=info, device=torch.device("cpu"), placed=placed)


def test_what_the_warm_up_compiled_serves_other_sizes_and_numbers() -> None:
    backend = Backend()
    predictor = predictor_on(backend)
    predictor.warm_up()
    compiled = backend.compiled
    assert compiled == 4  # the trunk for one picture and for several, the two heads
    for count, size in [(1, (120, 200)), (1, (97, 61)), (2, (64, 64)), (3, (40, 90)), (5, (120, 200)), (8, (97, 61))]:
        queries = [Query(picture(*size, seed=seed), DetectOptions(score_thresh=0.0)) for seed in range(count)]
        before = backend.runs
        found = answers(predictor, queries)
        assert backend.runs == before + 3  # by the compiled code, each part once
        assert predictor._placed.take_uncompiled() == []
        for one, expected in zip(found, answers(plain(), queries), strict=True):
            assert_same(one, expected, scale=2)
    assert backend.compiled == compiled


def test_what_fits_no_compiled_code_runs_without_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """A map of one cell a side, a length of which torch makes a constant."""
    backend = Backend()
    predictor = predictor_on(backend)
    predictor.warm_up()
    compiled = backend.compiled
    query = Query(picture(1, 3000), DetectOptions(score_thresh=0.0))
    (expected,) = answers(plain(), [query])
    for _ in range(2):
        (prediction,) = predictor.predict([query])
        assert prediction.uncompiled
        assert_same(prediction.detections, expected, scale=3000 / 192)
    assert backend.compiled == compiled
    (message,) = [record for record in caplog.records if "fits no compiled code" in record.message]  # not each time
    assert message.__dict__["fields"]["parts"] == "trunk"


def test_nothing_found_runs_compiled_code() -> None:
    predictor = predictor_on(Backend())
    predictor.warm_up()
    (prediction,) = predictor.predict([Query(picture(120, 200), DetectOptions(score_thresh=1.0))])
    assert not prediction.uncompiled
    assert len(prediction.detections) == 0


def test_other_settings_of_the_process_than_in_the_warm_up_are_noticed() -> None:
    """torch checks its number of threads, among others, at each call of compiled code."""
    predictor = predictor_on(Backend())
    predictor.warm_up()
    queries = [Query(picture(120, 200), DetectOptions())] * 8
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert all(one.uncompiled for one in predictor.predict(queries))
    finally:
        torch.set_num_threads(threads)
    assert not any(one.uncompiled for one in predictor.predict(queries))


class LimitedBackend(Backend):
    """Makes code that holds for fewer than five pictures, as a compiler may."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        values: list[Any] = list(inputs)  # among them sizes
        sizes: list[Any] = [value for value in values if isinstance(value, torch.SymInt)]
        for size in sizes:
            if 1 < int(size.node.hint) < 5:
                assert size < 5  # adds a guard
        return super().__call__(graph, inputs)


def test_batches_of_eight_get_their_own_code_if_that_for_two_does_not_hold_for_them() -> None:
    backend = LimitedBackend()
    predictor = predictor_on(backend)
    predictor.warm_up()
    compiled = backend.compiled
    assert compiled > 4
    for count in (1, 2, 8):
        queries = [Query(picture(120, 200, seed=seed), DetectOptions(score_thresh=0.0)) for seed in range(count)]
        assert not any(one.uncompiled for one in predictor.predict(queries))
    assert backend.compiled == compiled


def test_more_networks_than_dynamo_compiles_of_one_function_are_compiled_each() -> None:
    """It compiles the same code a bounded number of times; a network needs two of them for its trunk."""
    backend = Backend()
    model = network()
    fold(model)
    networks = [CompiledNetwork(model, backend=backend) for _ in range(2)]
    for number, one in enumerate(networks, start=1):
        with torch._dynamo.config.patch(recompile_limit=2), torch.inference_mode():
            one.parts().trunk(torch.zeros(1, 3, 128, 192))
            one.parts().trunk(torch.zeros(2, 3, 128, 192))
        assert one.uncompiled == ["box head", "mask head"]
        assert backend.compiled == 2 * number
    gone = weakref.ref(networks[1])
    del one, networks
    gc.collect()
    assert gone() is None


def test_network_that_goes_is_not_kept_by_what_was_compiled_for_it() -> None:
    predictor = predictor_on(Backend())
    predictor.warm_up()
    weights = weakref.ref(predictor._model.roi_heads.box_predictor.cls_score.weight)
    del predictor
    gc.collect()
    assert weights() is None


def test_what_is_compiled_is_kept_where_the_engines_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "/chosen/by/the/user")
    keep_compiled_code(tmp_path)
    keep_kernels(tmp_path)
    assert cache_dir() == os.environ["TRITON_CACHE_DIR"] == "/chosen/by/the/user"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch does by itself
    keep_compiled_code(tmp_path)
    assert cache_dir() == str(tmp_path / "inductor")
    monkeypatch.setenv("TRITON_CACHE_DIR", "of the user")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    keep_kernels(tmp_path)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    monkeypatch.delenv("TRITON_CACHE_DIR")
