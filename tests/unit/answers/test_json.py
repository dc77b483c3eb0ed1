"""Our JSON: the same bytes however it is split, in parts that are soon done."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import orjson
import pytest

from service.answers import encode, encoder_for
from service.answers.array import MASK_ENCODERS
from service.answers.encoder import never
from service.answers.json import JsonEncoder
from service.errors import AnswerTooLargeError
from service.structures import Detections, Image, Json, MaskFormat, MaskStyle
from tests.fakes import FAKE_INFO
from tests.unit.masks.cases import objects

IMAGE = Image(np.zeros((3000, 4000, 3), np.uint8))


def found(number: int) -> Detections:
    masks, boxes = objects(0, IMAGE.size, number)
    labels, scores = 1 + np.arange(number) % 2, np.linspace(1, 0.1, number, dtype=np.float32)
    return Detections(boxes, labels, scores, masks)


@pytest.mark.parametrize("masks", get_args(MaskFormat))
def test_answer_is_the_same_array_however_it_is_split(masks: MaskFormat) -> None:
    detections, form = found(30), Json(masks)
    [elements] = encoder_for(form).encode(IMAGE, detections, FAKE_INFO, should_stop=never)
    whole = encode(form, IMAGE, detections, FAKE_INFO)
    assert whole == b"[" + elements + b"]"
    assert [set(one) - {"mask"} for one in orjson.loads(whole)] == [{"box", "label", "label_id", "score"}] * 30


@pytest.mark.parametrize("form", [form for form in get_args(MaskFormat) if form != "none"])
@pytest.mark.parametrize("style", get_args(MaskStyle))
def test_every_form_follows_the_models_mask_style(form: MaskFormat, style: MaskStyle) -> None:
    detections = found(3)
    assert detections.masks is not None
    encoded = encode(Json(form), IMAGE, detections, replace(FAKE_INFO, mask_style=style))
    expected = MASK_ENCODERS[form](detections.masks, detections.boxes, IMAGE.size, style=style)
    as_json = orjson.loads(orjson.dumps(expected, option=orjson.OPT_SERIALIZE_NUMPY))
    assert [one["mask"] for one in orjson.loads(encoded)] == as_json


@pytest.mark.parametrize(
    ("sides", "parts"),
    [([], 1), ([100] * 100, 1), ([1000] * 20, 2), ([1000] * 60, 4), ([30_000] * 9, 9), ([1] * 300, 3)],
)
def test_parts_end_where_they_would_take_long(sides: list[int], parts: int) -> None:
    detections = squares(sides)
    split = JsonEncoder(Json("rle")).split(detections)
    assert len(split) == parts
    assert np.array_equal(np.concatenate([part.boxes for part in split]), detections.boxes)
    assert len(JsonEncoder(Json("none")).split(detections)) == 1


def squares(sides: list[int]) -> Detections:
    boxes = np.zeros((len(sides), 4), np.float32)
    boxes[:, 2], boxes[:, 3] = sides, sides
    numbers = np.zeros(len(sides))
    masks = np.zeros((len(sides), 2, 2), np.float32)
    return Detections(boxes, numbers.astype(np.int64), numbers.astype(np.float32), masks)


def test_masks_that_would_take_seconds_are_refused_with_a_way_out() -> None:
    detections = squares([7000] * 1000)
    with pytest.raises(AnswerTooLargeError, match=r"1000 masks .* max_detections .* masks=none"):
        JsonEncoder(Json("rle")).split(detections)
    assert len(JsonEncoder(Json("none")).split(detections)) == 1
    JsonEncoder(Json("rle")).split(squares([1500] * 1000))


def test_size_that_is_known_beforehand_is_never_more_than_the_real_one() -> None:
    for number in (0, 1, 12):
        detections = found(number)
        for masks in get_args(MaskFormat):
            real = len(encode(Json(masks), IMAGE, detections, FAKE_INFO))
            assert encoder_for(Json(masks)).least_bytes(IMAGE.size, detections) <= real
    assert encoder_for(Json("png")).least_bytes(IMAGE.size, found(12)) > 10_000
