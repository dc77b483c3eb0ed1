from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from service.modeling.config import ModelConfig
from service.structures import Detections, ModelInfo, Prediction, Query
from service.training.dataset import CocoDataset, load_coco
from service.training.evaluation import evaluate
from service.training.loop import evaluation_info
from tests.coco_folder import write_coco_folder

CONFIG = ModelConfig.model_validate(
    {
        "architecture": "mask_rcnn",
        "labels": ["disc"],
        "backbone": {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16},
    }
)


class Oracle:
    """Answers with the annotations themselves, its boxes moved by `shift` pixels, its masks filling their boxes."""

    def __init__(self, dataset: CocoDataset, *, shift: float = 0.0, keep: int | None = None) -> None:
        self._samples = iter(dataset.samples)
        self._shift = shift
        self._keep = keep

    @property
    def info(self) -> ModelInfo:
        return evaluation_info(CONFIG)

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        sample = next(self._samples)
        boxes = sample.boxes[: self._keep] + np.float32(self._shift)
        found = Detections(
            boxes=boxes,
            labels=sample.labels[: self._keep],
            scores=np.linspace(1, 0.5, len(boxes), dtype=np.float32),
            masks=np.ones((len(boxes), 28, 28), np.float32),
        )
        return [Prediction(found, {}, batch_size=len(queries))]


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    return load_coco(write_coco_folder(tmp_path) / "val.json")


def test_the_annotations_themselves_reach_one(dataset: CocoDataset) -> None:
    evaluation = evaluate(Oracle(dataset), dataset)
    assert evaluation.boxes.ap == pytest.approx(1.0)
    assert evaluation.boxes.ap75 == pytest.approx(1.0)
    assert evaluation.boxes.ap_by_label["disc"] == pytest.approx(1.0)
    assert math.isnan(evaluation.boxes.ap_large)  # there is no large disc


def test_square_masks_of_round_things_count_at_low_iou_only(dataset: CocoDataset) -> None:
    # pi / 4 = 0.785 of a square is its disc.
    masks = evaluate(Oracle(dataset), dataset).masks
    assert masks is not None
    assert masks.ap50 == pytest.approx(1.0)
    assert 0.3 < masks.ap < 0.8


def test_boxes_that_miss_count_nothing(dataset: CocoDataset) -> None:
    assert evaluate(Oracle(dataset, shift=40), dataset).boxes.ap50 == pytest.approx(0.0, abs=0.05)


def test_objects_not_found_cost_recall(dataset: CocoDataset) -> None:
    total = sum(len(sample.labels) for sample in dataset.samples)
    found = evaluate(Oracle(dataset, keep=1), dataset).boxes.ap50
    assert found == pytest.approx(len(dataset) / total, abs=0.02)


def test_no_detections_at_all_are_zero(dataset: CocoDataset) -> None:
    evaluation = evaluate(Oracle(dataset, keep=0), dataset)
    assert evaluation.boxes.ap == 0.0
    assert evaluation.masks is not None
    assert evaluation.masks.ap == 0.0
