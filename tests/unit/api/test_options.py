"""Options mean the same wherever they stand, and may stand in one place only."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.api.body import Upload
from service.api.options import (
    MAX_PROPOSALS,
    AnnotateParameters,
    DetectParameters,
    merge_options,
    read_proposals,
    resolve_options,
)
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
        ({"labels": []}, "option 'labels': expected at least 1 items, got 0$"),
        ({"score_tresh": 1}, r"unknown option 'score_tresh'; did you mean 'score_thresh'\?"),
        ({"score_tresh": 1, "mask": 1}, r"'score_tresh'; did .*; unknown option 'mask'; did you mean 'masks'\?"),
        ({"{x}": 1}, "unknown option '{x}'; there are: model, score_thresh, "),
        ({"masks": True}, "got true$"),
    ],
)
def test_json_options_have_json_types(json: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        merge_options(DetectParameters(), Upload([], json=json))


@pytest.mark.parametrize("option", ["score_thresh", "max_detections", "timeout_ms"])
def test_numbers_are_written_as_everybody_writes_them(option: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"option '{option}': input should be a number .*, got '0_1'"):
        merge_options(DetectParameters(), Upload([], form=[(option, "0_1")]))


def test_defaults_are_left_to_the_model() -> None:
    resolved = resolve_options(DetectParameters(), FAKE_INFO)
    assert resolved.options == DetectOptions(with_masks=True)
    assert resolved.mask_format == "rle"


def test_nobody_who_asks_for_no_masks_pays_for_them() -> None:
    assert not resolve_options(DetectParameters(masks="none"), FAKE_INFO).options.with_masks
    assert not resolve_options(DetectParameters(), FAKE_BOXES_INFO).options.with_masks


def test_labels_become_ids_which_begin_with_1() -> None:
    assert resolve_options(DetectParameters(labels=["dog"]), FAKE_INFO).options.label_ids == frozenset({2})


def test_proposals_are_the_same_in_form_and_json() -> None:
    json = Upload([], json={"proposals": [[0, 1.5, 10, 20]], "score_thresh": 0.5})
    form = Upload([], form=[("proposals", "[[0, 1.5, 10, 20]]"), ("score_thresh", "0.5")])
    for upload in (json, form):
        proposals = read_proposals(upload)
        assert merge_options(DetectParameters(), upload) == DetectParameters(score_thresh=0.5)
        assert resolve_options(DetectParameters(), FAKE_INFO, proposals).options.proposals == ((0.0, 1.5, 10.0, 20.0),)


def test_no_proposals_differ_from_none_at_all() -> None:
    assert read_proposals(Upload([], json={"proposals": []})) == ()
    assert read_proposals(Upload([], json={"proposals": None})) is None
    assert read_proposals(Upload([])) is None


BOX = [0, 0, 10, 10]


@pytest.mark.parametrize(
    ("proposals", "words"),
    [
        ([BOX, [5, 0, 5, 10]], r"proposals\[1\]: expected x1 < x2 and y1 < y2, got \[5.0, 0.0, 5.0, 10.0\]"),
        ([BOX, BOX, [0, 10, 10, 0]], r"proposals\[2\]: expected x1 < x2"),
        ([BOX, [0, 0, float("nan"), 10]], r"proposals\[1\]: .*finite"),
        ([[0, 0, float("inf"), 10]], r"proposals\[0\]: .*finite"),
        ([BOX, [0, 0, 10]], r"^proposals\[1\]: expected 4 numbers, got 3$"),
        ([[0, 0, 10, "10"]], r"proposals\[0\]: .*number"),
        ([[0, 0, 10, True]], r"proposals\[0\]: .*number"),
        (BOX, r"proposals\[0\]: .*list"),
        ("0,0,10,10", "proposals: .*list"),
        ([BOX] * (MAX_PROPOSALS + 1), "at most 2000 items"),
    ],
)
def test_proposal_that_is_no_box_is_refused_by_its_number(proposals: object, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        read_proposals(Upload([], json={"proposals": proposals}))


def test_as_many_proposals_as_are_allowed_are_taken() -> None:
    assert len(read_proposals(Upload([], json={"proposals": [BOX] * MAX_PROPOSALS})) or ()) == MAX_PROPOSALS


def test_proposals_of_a_form_are_json() -> None:
    with pytest.raises(InvalidRequestError, match="'proposals' is not JSON"):
        read_proposals(Upload([], form=[("proposals", "0 0 10 10")]))


def test_suppression_is_the_requests_where_it_says_so() -> None:
    options = resolve_options(DetectParameters(nms_thresh=0.3, class_agnostic_nms=True), FAKE_INFO).options
    assert (options.nms_thresh, options.class_agnostic_nms) == (0.3, True)
    options = resolve_options(DetectParameters(), FAKE_INFO).options
    assert (options.nms_thresh, options.class_agnostic_nms) == (None, None)


def test_roi_op_is_one_that_the_model_can_take() -> None:
    assert resolve_options(DetectParameters(roi_op="roi_pool"), FAKE_INFO).options.roi_op == "roi_pool"
    with pytest.raises(InvalidRequestError, match="cannot take roi_op='spp'; it can take: roi_pool, roi_align"):
        resolve_options(DetectParameters(roi_op="spp"), FAKE_INFO)
    with pytest.raises(InvalidRequestError, match="only its own, roi_align"):
        resolve_options(DetectParameters(roi_op="roi_align"), FAKE_BOXES_INFO)
    adaptive = replace(FAKE_INFO, roi_ops=("roi_pool", "roi_align", "roi_align_max"))
    with pytest.raises(InvalidRequestError, match=r"as its sampling_ratio is 0, adaptive, .*; it can take: roi_pool"):
        resolve_options(DetectParameters(roi_op="roi_warp"), adaptive)


def test_model_that_proposes_nothing_itself_is_given_proposals_or_refuses() -> None:
    info = replace(FAKE_BOXES_INFO, architecture="fast_rcnn", needs_proposals=True)
    with pytest.raises(InvalidRequestError, match=r"fast_rcnn that proposes no boxes itself; .* option 'proposals'"):
        resolve_options(DetectParameters(), info)
    assert resolve_options(DetectParameters(), info, ()).options.proposals == ()
    box = (0.0, 0.0, 10.0, 10.0)
    assert resolve_options(DetectParameters(), info, (box,)).options.proposals == (box,)


def test_a_part_that_cannot_be_drawn_is_named_once() -> None:
    with pytest.raises(InvalidRequestError, match=r"^option 'draw': 'foo' is not one of boxes, masks") as refused:
        merge_options(AnnotateParameters(), Upload([], json={"draw": "masks,foo"}))
    assert str(refused.value).count("'foo'") == 1
