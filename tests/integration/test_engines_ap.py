"""A bundled model scores alike by OpenVINO and by PyTorch, on real pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from service.inference.loading import load_predictor
from service.model_store.store import ModelStore
from service.training.dataset import load_coco
from service.training.evaluation import Evaluation, evaluate
from tests.shared_data import require

STORE = ModelStore(Path(__file__).resolve().parents[2] / "model_store")
PICTURES = 4


@pytest.mark.parametrize(("name", "data"), [("nuclei", "nuclei")])
def test_openvino_gives_the_average_precision_of_eager(name: str, data: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    annotations = require(data) / "val.json"

    def evaluation_by(engine: str) -> Evaluation:
        predictor = load_predictor(STORE.find(name), device="cpu", engine=engine, cache_dir=tmp_path)
        assert predictor.info.engine == engine
        dataset = load_coco(annotations, labels=predictor.info.labels)
        return evaluate(predictor, replace(dataset, samples=dataset.samples[:PICTURES]))

    for (kind, ours), (_, expected) in zip(
        evaluation_by("openvino").rows(), evaluation_by("eager").rows(), strict=True
    ):
        assert expected.ap > 0.2, kind
        assert ours.ap == pytest.approx(expected.ap, abs=1e-3), kind
        assert ours.ap50 == pytest.approx(expected.ap50, abs=1e-3), kind
