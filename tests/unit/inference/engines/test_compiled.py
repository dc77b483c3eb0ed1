"""The `compiled` engine compiles while it warms up, for all sizes at once, and never within a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from service.inference.engines.compiled import CompiledNetwork
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
    model.parts = CompiledNetwork(model, backend=backend).parts()
    info = replace(evaluation_info(CONFIG), engine="compiled")
    return Predictor(model, info=info, device=torch.device("cpu"))


def test_what_the_warm_up_compiled_serves_other_sizes_and_numbers() -> None:
    backend = Backend()
    predictor = predictor_on(backend)
    predictor.warm_up()
    compiled = backend.compiled
    assert compiled == 4  # the trunk for one picture and for several, the two heads
    for count, size in [(1, (120, 200)), (1, (97, 61)), (2, (64, 64)), (3, (40, 90)), (5, (120, 200))]:
        queries = [Query(picture(*size, seed=seed), DetectOptions(score_thresh=0.0)) for seed in range(count)]
        before = backend.runs
        found = answers(predictor, queries)
        assert backend.runs == before + 3  # by the compiled code, each part once
        for one, expected in zip(found, answers(plain(), queries), strict=True):
            assert_same(one, expected, scale=2)
    assert backend.compiled == compiled


def test_what_fits_no_compiled_code_runs_without() -> None:
    """Maps of one cell a side, and nothing found: lengths of which torch makes constants."""
    backend = Backend()
    predictor = predictor_on(backend)
    predictor.warm_up()
    compiled = backend.compiled
    for query in [
        Query(picture(1, 3000), DetectOptions(score_thresh=0.0)),
        Query(picture(120, 200), DetectOptions(score_thresh=1.0)),
    ]:
        (found,), (expected,) = answers(predictor, [query]), answers(plain(), [query])
        assert_same(found, expected, scale=3000 / 192)
    assert backend.compiled == compiled
