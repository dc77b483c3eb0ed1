"""Forms of other people's clients, made in one pass: the same however the answer is split, and in the model's style."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import orjson
import pytest

from service.answers import encode, encoder_for
from service.answers.encoder import never
from service.masks.png import encode_png
from service.masks.polygons import encode_outlines
from service.structures import (
    Cvat,
    Detections,
    Form,
    HuggingFace,
    Image,
    LabelStudio,
    LabelStudioTag,
    MaskStyle,
    RegionType,
)
from tests.fakes import FAKE_INFO
from tests.unit.masks.cases import objects

IMAGE = Image(np.zeros((300, 400, 3), np.uint8))


def found(number: int) -> Detections:
    masks, boxes = objects(0, IMAGE.size, number)
    labels, scores = 1 + np.arange(number) % 2, np.linspace(1, 0.1, number, dtype=np.float32)
    return Detections(np.clip(boxes, 0, [400, 300, 400, 300]).astype(np.float32), labels, scores, masks)


def tag(
    kind: RegionType, labels: tuple[str | None, ...] = ("Cat", "Dog"), score_thresh: float = 0.05
) -> LabelStudioTag:
    return LabelStudioTag(kind, f"my {kind}", "image", labels, score_thresh)


def project(*tags: LabelStudioTag) -> LabelStudio:
    return LabelStudio("fake@1", tags)


FORMS = [
    HuggingFace(),
    HuggingFace(with_masks=True),
    Cvat(),
    Cvat(with_masks=True),
    project(*map(tag, get_args(RegionType))),
    project(tag("rectanglelabels")),
]


def decoded(form: Form, detections: Detections) -> Any:
    """The answer without the regions' random ids."""
    encoded = encode(form, IMAGE, detections, FAKE_INFO)
    return orjson.loads(re.sub(rb'"id":"[0-9a-f]{10}"', b'"id":""', encoded))


@pytest.mark.parametrize("form", FORMS)
def test_answer_is_the_same_however_it_is_split(form: Form) -> None:
    detections, encoder = found(30), encoder_for(form)
    pieces = [list(encoder.encode(IMAGE, detections[i : i + 1], FAKE_INFO, should_stop=never)) for i in range(30)]
    joined = re.sub(rb'"id":"[0-9a-f]{10}"', b'"id":""', encoder.join(pieces))
    assert orjson.loads(joined) == decoded(form, detections)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_found_is_an_empty_array(form: Form) -> None:
    nothing = {"model_version": "fake@1", "score": None, "result": []} if isinstance(form, LabelStudio) else []
    assert decoded(form, found(0)) == nothing
    empty = replace(found(2), masks=np.zeros((2, 28, 28), np.float32))
    if form == Cvat(with_masks=True):
        assert decoded(form, empty) == []


@pytest.mark.parametrize("style", get_args(MaskStyle))
def test_masks_follow_the_models_style(style: MaskStyle) -> None:
    detections, info = found(5), replace(FAKE_INFO, mask_style=style)
    assert detections.masks is not None
    outlines = encode_outlines(detections.masks, detections.boxes, IMAGE.size, style=style)
    shapes = orjson.loads(encode(Cvat(with_masks=True), IMAGE, detections, info))
    assert [one["points"] for one in shapes] == [one[0] for one in outlines if one]
    pictures = orjson.loads(encode(HuggingFace(with_masks=True), IMAGE, detections, info))
    expected = encode_png(detections.masks, detections.boxes, IMAGE.size, style=style)
    assert [one["mask"] for one in pictures] == expected
    prediction = orjson.loads(encode(project(tag("polygonlabels")), IMAGE, detections, info))
    numbers = [len(points) for parts in outlines for points in parts]
    assert [2 * len(one["value"]["points"]) for one in prediction["result"]] == numbers


def test_tags_take_their_labels_above_their_thresholds() -> None:
    detections = replace(found(3), labels=np.array([1, 2, 1]), scores=np.array([0.75, 0.5, 0.25], np.float32))
    boxes = tag("rectanglelabels", ("Cat", None))
    brushes = tag("brushlabels", (None, "Dog"), score_thresh=0.5)
    prediction = decoded(project(boxes, brushes), detections)
    assert [(one["score"], one["value"]["rectanglelabels"]) for one in prediction["result"]] == [
        (0.75, ["Cat"]),
        (0.25, ["Cat"]),
    ]
    assert prediction["score"] == 0.5
    assert encoder_for(project(boxes, brushes)).left_out(detections) == 0
    assert encoder_for(project(boxes)).left_out(detections) == 1


def test_many_tags_make_more_parts() -> None:
    boxes = replace(found(30), masks=None)
    lengths = {
        number: [len(part) for part in encoder_for(project(*[tag("rectanglelabels")] * number)).split(boxes)]
        for number in (1, 20, 50)
    }
    assert lengths == {1: [30], 20: [12, 12, 6], 50: [5] * 6}
    assert [len(part) for part in encoder_for(project(tag("rectanglelabels"))).split(boxes[:0])] == [0]


def test_boxes_of_hugging_face_are_whole_pixels() -> None:
    detections = Detections(np.array([[0.9, 1, 31.99, 47]], np.float32), np.array([2]), np.array([0.8], np.float32))
    box = {"xmin": 0, "ymin": 1, "xmax": 31, "ymax": 47}
    assert decoded(HuggingFace(), detections) == [{"label": "dog", "score": 0.8, "box": box}]
