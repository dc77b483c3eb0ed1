"""COCO results: boxes by their sides, categories by the caller's ids, however the answer is split."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from service.answers import encode
from service.structures import Coco, Detections, Image
from tests.fakes import FAKE_INFO

IMAGE = Image(np.zeros((300, 400, 3), np.uint8))
FOUND = Detections(
    np.array([[1, 2, 4, 8], [0, 0, 400, 300]], np.float32),
    np.array([2, 1]),
    np.array([0.75, 0.5], np.float32),
    np.ones((2, 28, 28), np.float32),
)


@pytest.mark.parametrize(("category_ids", "expected"), [(None, [2, 1]), ((90, 7), [7, 90])])
def test_results_are_cocos(category_ids: tuple[int, ...] | None, expected: list[int]) -> None:
    results = orjson.loads(encode(Coco("a.png", False, category_ids), IMAGE, FOUND, FAKE_INFO))
    assert results == [
        {"image_id": "a.png", "category_id": expected[0], "bbox": [1, 2, 3, 6], "score": 0.75},
        {"image_id": "a.png", "category_id": expected[1], "bbox": [0, 0, 400, 300], "score": 0.5},
    ]


def test_masks_are_segmentations_of_the_whole_image() -> None:
    results = orjson.loads(encode(Coco(7, True), IMAGE, FOUND, FAKE_INFO))
    assert [one["segmentation"]["size"] for one in results] == [[300, 400]] * 2
    without = Detections(FOUND.boxes, FOUND.labels, FOUND.scores)
    assert "segmentation" not in orjson.loads(encode(Coco(7, True), IMAGE, without, FAKE_INFO))[0]


def test_nothing_found_is_an_empty_array() -> None:
    assert encode(Coco(7, True), IMAGE, FOUND[:0], FAKE_INFO) == b"[]"
