"""An import is held to what its source's own code has found in a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import ModelStoreError
from service.model_store.checking import Answer, compare, read_answer, told

BOXES = [[10.0, 10, 50, 50], [60, 10, 90, 40], [5, 60, 25, 90]]
SCORES = [0.9, 0.8, 0.7]


def answer(boxes: Any = BOXES, labels: Any = (1, 2, 1), scores: Any = SCORES) -> Answer:
    return Answer(np.array(boxes, float).reshape(-1, 4), np.array(labels, np.int64), np.array(scores, float))


def test_the_same_detections_in_another_order_agree() -> None:
    found = answer(BOXES[::-1], (1, 2, 1), SCORES[::-1])
    comparison = compare(answer(), found)
    assert comparison.agrees
    assert (comparison.matched, comparison.lowest_iou, comparison.largest_score_difference) == (3, 1, 0)


@pytest.mark.parametrize(
    "found",
    [
        answer(labels=(2, 1, 2)),  # labels in another order
        answer(scores=[0.9, 0.8, 0.5]),  # another score
        answer(boxes=[*BOXES[:2], [5, 60, 35, 90]]),  # another box
        answer(BOXES[:2], (1, 2), SCORES[:2]),  # one too few
        answer([*BOXES, [0, 0, 9, 9]], (1, 2, 1, 1), [*SCORES, 0.6]),  # one too many
        answer([], (), ()),
    ],
)
def test_any_other_answer_does_not_agree(found: Answer) -> None:
    comparison = compare(answer(), found)
    assert not comparison.agrees
    assert "does not answer as its source" in told(comparison)[-1]


def test_one_found_box_serves_one_expected_detection() -> None:
    twice = answer([BOXES[0], BOXES[0]], (1, 1), [0.9, 0.9])
    assert compare(twice, answer([BOXES[0]], (1,), [0.9])).matched == 1


def test_a_picture_without_detections_proves_nothing() -> None:
    nothing = answer([], (), ())
    assert not compare(nothing, nothing).agrees
    assert "proves nothing" in told(compare(nothing, nothing))[-1]


@pytest.mark.parametrize(
    "document",
    [
        {"boxes": BOXES, "labels": [1, 2, 1], "scores": SCORES},
        [{"boxes": BOXES, "labels": [1, 2, 1], "scores": SCORES, "masks": None}],
        {"boxes": BOXES, "classes": [0, 1, 0], "scores": SCORES},
        {"pred_boxes": BOXES, "pred_classes": [0, 1, 0], "scores": SCORES},
        {"bboxes": BOXES, "labels": [0, 1, 0], "scores": SCORES},
    ],
)
def test_the_answers_of_all_three_are_read(document: object, tmp_path: Path) -> None:
    path = tmp_path / "answer.json"
    path.write_text(json.dumps(document))
    read = read_answer(path)
    assert read.boxes.tolist() == BOXES
    assert read.labels.tolist() == [1, 2, 1]
    assert read.scores.tolist() == SCORES


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"boxes": [[1, 2, 3]], "labels": [1], "scores": [1]}', '"a"', "{" * 9999]
)
def test_what_is_no_answer_is_refused_with_the_form_of_one(text: str, tmp_path: Path) -> None:
    path = tmp_path / "answer.json"
    path.write_text(text)
    with pytest.raises(ModelStoreError, match=r"answer\.json: expected detections as JSON, \{'boxes'"):
        read_answer(path)
