"""The models that come with the repository: small, as good as their cards say, and at work on the example pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from service.imaging.decode import ImageLimits, decode_image
from service.inference.loading import load_predictor
from service.inference.predictor import Predictor
from service.masks.rle import encode_rle
from service.model_store.store import ModelStore, StoredModel
from service.structures import Detections, DetectOptions, Image, Query
from service.training.dataset import load_coco
from service.training.evaluation import evaluate
from tests.shared_data import require

REPOSITORY = Path(__file__).resolve().parents[2]
STORE = ModelStore(REPOSITORY / "model_store")
DATA = {"nuclei": "nuclei", "blood-cells": "bccd"}
AIMS = {
    "nuclei": {"boxes": {"AP50": 0.80}, "masks": {"AP50": 0.78}},
    "blood-cells": {"boxes": {"AP50": 0.90, "AP": 0.58}},
}


@pytest.fixture(scope="module", params=DATA)
def stored(request: pytest.FixtureRequest) -> StoredModel:
    return STORE.find(request.param)


@pytest.fixture(scope="module")
def nuclei() -> Predictor:
    return load_predictor(STORE.find("nuclei"), device="cpu")


def example(name: str) -> Image:
    return decode_image((REPOSITORY / "examples" / name).read_bytes(), limits=ImageLimits(max_image_pixels=10**7))


def answer(predictor: Predictor, picture: Image) -> Detections:
    return predictor.predict([Query(picture, DetectOptions())])[0].detections


def test_it_is_small_and_says_where_it_comes_from(stored: StoredModel) -> None:
    assert stored.problem is None
    assert stored.weights_path.stat().st_size <= 12_000_000
    provenance = stored.model_toml.provenance
    assert provenance.data
    assert provenance.licence
    assert provenance.command
    assert provenance.command.startswith("roiserve train ")
    card = (stored.path / "README.md").read_text()
    for kind, aims in AIMS[stored.name].items():
        figures = provenance.metrics[kind]
        assert isinstance(figures, dict)
        for name, aim in aims.items():
            assert figures[name] >= aim
            assert f"{figures[name]:.3f}" in card


def test_it_reaches_the_figures_of_its_card(stored: StoredModel) -> None:
    predictor = load_predictor(stored, device="cpu")
    dataset = load_coco(require(DATA[stored.name]) / "val.json", labels=predictor.info.labels)
    evaluation = evaluate(predictor, dataset)
    for kind, figures in evaluation.rows():
        card = stored.model_toml.provenance.metrics[kind]
        assert isinstance(card, dict)
        assert figures.ap == pytest.approx(card["AP"], abs=0.003)
        assert figures.ap50 == pytest.approx(card["AP50"], abs=0.003)
        assert figures.ap75 == pytest.approx(card["AP75"], abs=0.005)


@pytest.mark.parametrize("name", DATA)
def test_its_quantised_version_is_small_keeps_its_ap_and_fits_what_is_installed(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    quantised = STORE.find(f"{name}@2")
    assert sum(file.stat().st_size for file in quantised.path.iterdir()) <= 6_000_000
    table = quantised.model_toml.int8
    assert table is not None
    for kind, ap in table.ap["float32"].items():
        assert table.ap["int8"][kind] >= ap - 0.003
        assert f"{100 * table.ap['int8'][kind]:.2f}" in (quantised.path / "README.md").read_text()
    predictor = load_predictor(quantised, device="cpu", precision="int8", cache_dir=tmp_path)
    predictor.warm_up()
    assert (predictor.info.engine, predictor.info.precision) == ("openvino", "int8")


def test_the_version_that_a_name_stands_for_is_the_one_in_float32() -> None:
    assert [STORE.find(name).key for name in DATA] == ["nuclei@1", "blood-cells@1"]


@pytest.mark.parametrize(("name", "at_least"), [("nuclei-1.png", 20), ("nuclei-2.png", 20), ("nuclei-stained.png", 15)])
def test_nuclei_are_found_in_the_examples_with_masks_that_lie_in_their_boxes(
    nuclei: Predictor, name: str, at_least: int
) -> None:
    picture = example(name)
    found = answer(nuclei, picture)
    assert len(found) >= at_least
    assert found.masks is not None
    for rle, box in zip(encode_rle(found.masks, found.boxes, picture.size), found.boxes, strict=True):
        rows, columns = np.nonzero(coco_mask.decode(rle))
        assert len(rows) > 0
        # The mask head's 28 x 28 probabilities are spread over the box and half a cell of theirs around it.
        slack = 1 + (box[2:] - box[:2]) / 28
        assert (columns.min(), rows.min()) >= tuple(np.floor(box[:2] - slack))
        assert columns.max() <= box[2] + slack[0]
        assert rows.max() <= box[3] + slack[1]


def test_two_operators_get_the_same_proposals(nuclei: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page says so of two requests that differ in nothing but the operator."""
    heads = nuclei._model.roi_heads
    detect_boxes, given = heads.detect_boxes, []

    def spy(features: Any, proposals: list[Tensor], *arguments: Any, **options: Any) -> object:
        given.append(proposals[0].clone())
        return detect_boxes(features, proposals, *arguments, **options)

    monkeypatch.setattr(heads, "detect_boxes", spy)
    picture = example("nuclei-1.png")
    found = [nuclei.predict([Query(picture, DetectOptions(roi_op=op))])[0].detections for op in (None, "roi_pool")]
    assert len(given[0]) > 100
    assert torch.equal(*given)
    assert not np.array_equal(found[0].scores, found[1].scores)


def test_a_lower_score_changes_nothing_above_it(nuclei: Predictor) -> None:
    """The page asks with a low score and filters by itself."""
    low, high = (
        nuclei.predict([Query(example("nuclei-1.png"), DetectOptions(score_thresh=score))])[0].detections
        for score in (0.05, 0.5)
    )
    kept = low[np.flatnonzero(low.scores > 0.5)]
    assert len(low) > len(kept) > 0
    for name, values in high.arrays().items():
        np.testing.assert_allclose(kept.arrays()[name], values, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["blood-smear-1.jpg", "blood-smear-2.jpg"])
def test_blood_cells_of_each_kind_are_found_in_the_examples(name: str) -> None:
    predictor = load_predictor(STORE.find("blood-cells"), device="cpu")
    labels = [predictor.info.labels[label - 1] for label in answer(predictor, example(name)).labels]
    assert labels.count("WBC") == 1
    assert labels.count("RBC") >= 10
    assert labels.count("Platelets") >= 2


@pytest.mark.parametrize("name", DATA)
def test_it_answers_alone_as_among_seven_others(name: str) -> None:
    predictor = load_predictor(STORE.find(name), device="cpu")
    picture = example("nuclei-1.png" if name == "nuclei" else "blood-smear-1.jpg")
    others = [Image(np.roll(picture.pixels, 31 * shift, axis=1)) for shift in range(1, 8)]
    alone = answer(predictor, picture)
    among = predictor.predict([Query(one) for one in [*others[:3], picture, *others[3:]]])[3].detections
    np.testing.assert_array_equal(among.labels, alone.labels)
    np.testing.assert_allclose(among.boxes, alone.boxes, atol=1e-3)
    np.testing.assert_allclose(among.scores, alone.scores, atol=1e-4)
