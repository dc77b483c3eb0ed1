"""Roboflow's predictions: centre boxes, classes from 0, and a mask for every object or for none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import orjson
from pycocotools import mask as coco

from service.answers import encode
from service.structures import Detections, Float32Array, Image, Roboflow
from tests.fakes import FAKE_INFO

IMAGE = Image(np.zeros((300, 400, 3), np.uint8))
BOXES = np.array([[10.3, 20.7, 41.1, 80.9], [0, 0, 300, 200]], np.float32)


def found(masks: Sequence[Float32Array]) -> Detections:
    return Detections(BOXES, np.array([2, 1]), np.array([0.75, 0.5], np.float32), np.stack(masks))


def test_client_computes_the_very_corners_from_the_centres() -> None:
    masks = [np.ones((28, 28), np.float32)] * 2
    predictions = orjson.loads(encode(Roboflow("none"), IMAGE, found(masks), FAKE_INFO))
    assert [set(one) for one in predictions] == [
        {"x", "y", "width", "height", "confidence", "class", "class_id"},
    ] * 2
    assert [(one["class"], one["class_id"]) for one in predictions] == [("dog", 1), ("cat", 0)]
    x1 = [one["x"] - one["width"] / 2 for one in predictions]
    y2 = [one["y"] + one["height"] / 2 for one in predictions]
    assert np.allclose(x1, BOXES[:, 0], rtol=0, atol=1e-5)
    assert np.allclose(y2, BOXES[:, 3], rtol=0, atol=1e-5)


def test_points_outline_the_largest_part_and_an_empty_mask_is_still_a_mask() -> None:
    two = np.zeros((28, 28), np.float32)
    two[:4, :4] = 1
    two[12:, 12:] = 1
    masks = [np.zeros((28, 28), np.float32), two]
    empty, parts = orjson.loads(encode(Roboflow("points"), IMAGE, found(masks), FAKE_INFO))
    assert empty["points"] == []
    assert coco.decode(empty["rle"]).shape == (300, 400)
    assert coco.area(empty["rle"]) == 0
    assert min(point["x"] for point in parts["points"]) > 100
    assert "rle" not in parts


def test_run_lengths_are_those_of_our_json() -> None:
    masks = [np.ones((28, 28), np.float32), np.eye(28, dtype=np.float32)]
    predictions = orjson.loads(encode(Roboflow("rle"), IMAGE, found(masks), FAKE_INFO))
    assert [one["rle"]["size"] for one in predictions] == [[300, 400]] * 2
    assert not any("points" in one for one in predictions)
