"""Options mean the same wherever they stand, and may stand in one place only."""

from __future__ import annotations

import pytest

from service.api.body import Upload
from service.api.options import DetectParameters, merge_options, understand
from service.errors import InvalidRequestError
from service.structures import DetectOptions
from tests.fakes import FAKE_BOXES_INFO, FAKE_INFO


def test_form_and_json_add_to_the_query() -> None:
    query = DetectParameters(model="a")
    form = merge_options(query, Upload([], form=[("score_thresh", "0.5"), ("labels", "cat"), ("labels", "dog")]))
    json = merge_options(query, Upload([], json={"score_thresh": 0.5, "labels": ["cat", "dog"]}))
    assert form == json == DetectParameters(model="a", score_thresh=0.5, labels=["cat", "dog"])


@pytest.mark.parametrize(
    "upload",
    [
        Upload([], form=[("model", "b")]),
        Upload([], json={"model": "b"}),
        Upload([], json={"model": "a"}),
    ],
)
def test_option_in_two_places_is_refused_even_if_they_agree(upload: Upload) -> None:
    with pytest.raises(InvalidRequestError, match="'model' is given twice"):
        merge_options(DetectParameters(model="a"), upload)


@pytest.mark.parametrize(
    ("json", "words"),
    [
        ({"score_thresh": "0.5"}, "score_thresh"),
        ({"score_thresh": True}, "score_thresh"),
        ({"max_detections": 1.5}, "max_detections"),
        ({"labels": "cat"}, "labels"),
        ({"labels": []}, "labels"),
        ({"tresh": 1}, "unknown option 'tresh'"),
    ],
)
def test_json_options_have_json_types(json: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        merge_options(DetectParameters(), Upload([], json=json))


def test_defaults_are_left_to_the_model() -> None:
    wish = understand(DetectParameters(), FAKE_INFO)
    assert wish.options == DetectOptions(with_masks=True)
    assert wish.mask_format == "rle"


def test_nobody_who_asks_for_no_masks_pays_for_them() -> None:
    assert not understand(DetectParameters(masks="none"), FAKE_INFO).options.with_masks
    assert not understand(DetectParameters(), FAKE_BOXES_INFO).options.with_masks


def test_labels_become_ids_which_begin_with_1() -> None:
    assert understand(DetectParameters(labels=["dog"]), FAKE_INFO).options.label_ids == frozenset({2})
