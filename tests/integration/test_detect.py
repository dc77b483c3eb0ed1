"""What a caller gets for a good picture: the same answer however it was sent, in the form that was asked for."""

from __future__ import annotations

import base64
import io
import socket
from collections.abc import Callable
from http.client import HTTPResponse
from typing import Any

import numpy as np
import orjson
import PIL.Image
import pycocotools.mask
import pytest

from service.api.schemas import BatchAnswer, DetectAnswer, ModelList
from service.load.client import Target
from tests.fakes import picture
from tests.integration.conftest import Live

# Mean red 204 / 255 = 0.8: a cat of 0.8 in the left half, a dog of 0.08 in the whole of 64 x 48 pixels.
PICTURE = picture(red=204)
CAT = {"box": [0, 0, 32, 48], "label": "cat", "label_id": 1, "score": pytest.approx(0.8)}
DOG = {"box": [0, 0, 64, 48], "label": "dog", "label_id": 2, "score": pytest.approx(0.08)}


def without_masks(answer: dict[str, list[dict[str, object]]]) -> list[dict[str, object]]:
    return [{key: value for key, value in one.items() if key != "mask"} for one in answer["detections"]]


def test_answer_is_what_the_model_found(live: Live) -> None:
    response = live.detect(PICTURE)
    answer = response.json()
    assert response.status_code == 200
    assert without_masks(answer) == [CAT, DOG]
    assert (answer["model"], answer["version"], answer["roi_op"]) == ("fake", 1, "roi_align")
    assert answer["image"] == {"width": 64, "height": 48, "orientation_applied": False}
    assert answer["request_id"] == response.headers["X-Request-ID"]
    DetectAnswer.model_validate(answer)


def test_three_kinds_of_body_give_the_same_answer(live: Live) -> None:
    raw = live.detect(PICTURE).json()
    form = live.client.post("/v1/detect", files={"image": ("a.png", PICTURE)}).json()
    json = live.client.post("/v1/detect", json={"image": base64.b64encode(PICTURE).decode()}).json()
    assert raw["detections"] == form["detections"] == json["detections"] != []


def test_body_without_content_type_is_taken_as_an_image(live: Live) -> None:
    response = live.client.post("/v1/detect", content=PICTURE)
    assert "content-type" not in response.request.headers
    assert response.status_code == 200


def test_options_mean_the_same_in_query_form_and_json(live: Live) -> None:
    options: dict[str, Any] = {"score_thresh": 0.05, "max_detections": 1, "labels": ["dog", "cat"], "masks": "none"}
    query = live.client.post("/v1/detect", content=PICTURE, params=options)
    form = live.client.post("/v1/detect", files={"image": ("a.png", PICTURE)}, data=options)
    json = live.client.post("/v1/detect", json={"image": base64.b64encode(PICTURE).decode(), **options})
    for response in (query, form, json):
        assert response.json()["detections"] == [CAT]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"score_thresh": 0.5}, [CAT]),
        ({"score_thresh": 0}, [CAT, DOG]),
        ({"max_detections": 1}, [CAT]),
        ({"labels": "dog"}, [DOG]),
        ({"labels": ["cat", "dog"]}, [CAT, DOG]),
        ({"score_thresh": 1}, []),
    ],
)
def test_options_choose_detections(live: Live, options: dict[str, Any], expected: list[object]) -> None:
    assert without_masks(live.client.post("/v1/detect", content=PICTURE, params=options).json()) == expected


def test_masks_come_as_coco_run_lengths_by_default(live: Live) -> None:
    cat = live.detect(PICTURE).json()["detections"][0]
    mask = pycocotools.mask.decode(cat["mask"])
    assert mask.shape == (48, 64)
    assert mask[2:-2, 2:30].all()  # a pasted mask fades out over its box's edge
    assert not mask[:, 34:].any()


@pytest.mark.parametrize(("form", "kind"), [("rle", dict), ("polygons", list), ("png", str), ("crop", dict)])
def test_masks_come_in_the_form_that_was_asked_for(live: Live, form: str, kind: type) -> None:
    answer = live.detect(PICTURE, masks=form).json()
    assert [type(detection["mask"]) for detection in answer["detections"]] == [kind, kind]
    DetectAnswer.model_validate(answer)


def test_png_mask_has_the_size_of_the_image(live: Live) -> None:
    cat = live.detect(PICTURE, masks="png").json()["detections"][0]
    assert PIL.Image.open(io.BytesIO(base64.b64decode(cat["mask"]))).size == (64, 48)


def test_no_masks_where_none_are_asked_or_had(live: Live) -> None:
    assert all("mask" not in one for one in live.detect(PICTURE, masks="none").json()["detections"])
    assert all("mask" not in one for one in live.detect(PICTURE, model="fake-boxes").json()["detections"])


def test_model_is_chosen_by_name_or_version(live: Live) -> None:
    for name, expected in [("fake", "fake"), ("fake@1", "fake"), ("fake-boxes", "fake-boxes")]:
        assert live.detect(PICTURE, model=name).json()["model"] == expected


def test_times_of_all_stages_are_told(live: Live) -> None:
    response = live.detect(PICTURE)
    timings = response.json()["timings_ms"]
    stages = ["decode", "queue", "inference", "encode"]
    assert list(timings) == [*stages, "total"]
    assert 0 < sum(timings[stage] for stage in stages) <= timings["total"]
    named = [entry.split(";dur=")[0] for entry in response.headers["Server-Timing"].split(", ")]
    assert named == ["body", *stages, "total"]


@pytest.mark.parametrize(
    ("sent", "is_kept"),
    [("my-id.42:a/b", True), ("x" * 128, True), ("x" * 129, False), ("two words", False), ("<script>", False)],
)
def test_sane_request_ids_are_kept(live: Live, sent: str, is_kept: bool) -> None:
    response = live.client.get("/healthz", headers={"X-Request-ID": sent})
    assert (response.headers["X-Request-ID"] == sent) == is_kept
    assert len(response.headers["X-Request-ID"]) > 0


def test_images_that_wait_together_share_a_batch_and_answer_as_alone(serve: Callable[..., Live]) -> None:
    live = serve(max_batch_size=8)
    pictures = [picture(red=red) for red in (20, 50, 100, 150, 200, 250)]
    alone = [live.detect(one).json()["detections"] for one in pictures]
    files = [("image", (f"{index}.png", one)) for index, one in enumerate(pictures)]
    first = live.hold_device()
    together = live.in_background(live.client.post, "/v1/detect/batch", files=files)
    live.wait_for_metric('roiserve_queue_depth{model="fake@1"}', 6)
    live.release_device()
    answer = together.result().json()
    assert [result["detections"] for result in answer["results"]] == alone
    assert [result["batch_size"] for result in answer["results"]] == [6] * 6
    assert first.result().json()["batch_size"] == 1


def test_batch_answers_each_image_in_order_and_a_broken_one_with_its_error(live: Live) -> None:
    files = [("image", ("a", picture(red=204))), ("image", ("b", b"nonsense")), ("image", ("c", picture(red=102)))]
    response = live.client.post("/v1/detect/batch", files=files)
    answer = response.json()
    assert response.status_code == 200
    assert without_masks(answer["results"][0]) == [CAT, DOG]
    assert answer["results"][1]["error"]["status"] == 415
    assert answer["results"][2]["detections"][0]["score"] == pytest.approx(0.4)
    BatchAnswer.model_validate(answer)


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_annotate_answers_the_picture_with_detections_drawn(live: Live, image_format: str) -> None:
    grey = picture(red=204, height=200, width=300)
    response = live.client.post("/v1/annotate", content=grey, params={"format": image_format})
    assert response.headers["Content-Type"] == f"image/{image_format}"
    drawn = PIL.Image.open(io.BytesIO(response.content))
    assert (drawn.format, drawn.size) == (image_format.upper(), (300, 200))
    assert not np.array_equal(np.asarray(drawn), np.asarray(PIL.Image.open(io.BytesIO(grey))))


def test_models_are_listed_with_what_callers_need(live: Live) -> None:
    answer = live.client.get("/v1/models").json()
    assert [(one["name"], one["default"], one["has_masks"]) for one in answer["models"]] == [
        ("fake", True, True),
        ("fake-boxes", False, False),
    ]
    assert answer["models"][0]["labels"] == ["cat", "dog"]
    ModelList.model_validate(answer)
    assert live.client.get("/v1/models/fake@1").json() == answer["models"][0]


def test_large_body_in_many_chunks_arrives_whole(live: Live) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).save(buffer, "PNG")
    data = buffer.getvalue()
    assert len(data) > 300_000
    chunks = (data[start : start + 10_000] for start in range(0, len(data), 10_000))
    response = live.client.post("/v1/detect", content=chunks)
    assert response.request.headers["Transfer-Encoding"] == "chunked"
    assert response.json()["image"] == {"width": 400, "height": 300, "orientation_applied": False}


def test_proposals_of_the_caller_take_the_place_of_the_models_own(live: Live) -> None:
    proposals = [[1, 2, 30, 40], [0.5, 0, 64, 48]]
    form = live.client.post("/v1/detect", files={"image": PICTURE}, data={"proposals": str(proposals)}).json()
    body = {"image": base64.b64encode(PICTURE).decode(), "proposals": proposals, "masks": "none"}
    json = live.client.post("/v1/detect", json=body).json()
    assert without_masks(form) == json["detections"] == [CAT | {"box": box} for box in proposals]
    assert live.client.post("/v1/detect", json=body | {"proposals": []}).json()["detections"] == []


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("/v1/detect", {"data": {"proposals": "[[0, 0, 9, 9], [9, 0, 0, 9]]"}}, "proposals[1]: expected x1 < x2"),
        ("/v1/detect", {"data": {"proposals": "[[0, 0, 9, 1e999]]"}}, "not JSON"),
        ("/v1/detect", {"data": {"proposals": "[[0, 0, 9, 9], [1, 2, 3]]"}}, "proposals[1]"),
        ("/v1/detect", {"data": {"proposals": str([[0, 0, 9, 9]] * 2001)}}, "at most 2000"),
        ("/v1/detect", {"params": {"proposals": "[[0, 0, 9, 9]]"}}, "'proposals' goes into the form or the JSON"),
        ("/v1/detect/batch", {"data": {"proposals": "[[0, 0, 9, 9]]"}}, "boxes of one image"),
    ],
)
def test_proposals_that_cannot_be_meant_are_refused(live: Live, path: str, options: dict[str, Any], words: str) -> None:
    response = live.client.post(path, files={"image": PICTURE}, **options)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert words in response.json()["detail"]


def test_roi_op_of_a_request_is_echoed_and_refused_where_the_server_does_not_allow_it(
    live: Live, serve: Callable[..., Live]
) -> None:
    refused = live.detect(PICTURE, roi_op="roi_pool")
    assert refused.status_code == 422
    assert "allow_roi_op_override" in refused.json()["detail"]
    allowing = serve(allow_roi_op_override=True)
    assert allowing.detect(PICTURE, roi_op="roi_pool").json()["roi_op"] == "roi_pool"
    assert allowing.detect(PICTURE).json()["roi_op"] == "roi_align"
    assert "it can take: roi_pool, roi_align" in allowing.detect(PICTURE, roi_op="magic").json()["detail"]


def test_images_with_different_operators_do_not_share_a_batch(serve: Callable[..., Live]) -> None:
    live = serve(max_batch_size=8, allow_roi_op_override=True)
    first = live.hold_device()
    ops = ["roi_pool", "roi_align", "roi_pool", "roi_align", "roi_pool"]
    waiting = [live.in_background(live.detect, PICTURE, roi_op=op) for op in ops]
    live.wait_for_metric('roiserve_queue_depth{model="fake@1"}', len(ops))
    live.release_device()
    sizes = [(future.result().json()["roi_op"], future.result().json()["batch_size"]) for future in waiting]
    assert sizes == [(op, {"roi_pool": 3, "roi_align": 2}[op]) for op in ops]
    assert first.result().json()["batch_size"] == 1


def test_head_and_a_large_body_may_come_in_one_piece(live: Live) -> None:
    """A picture of 150 KB right behind its head: no byte of it counts as one of the head."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 250, 3), np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).save(buffer, "PNG")
    body = buffer.getvalue()
    target = Target.of_url(live.url)
    with socket.create_connection(target.address) as connection:
        for _ in range(5):
            connection.sendall(target.request("POST", "/v1/detect", body=body))
            answer = HTTPResponse(connection)
            answer.begin()
            assert (answer.status, len(orjson.loads(answer.read())["detections"]) > 0) == (200, True)


def test_class_scores_are_answered_on_request(live: Live) -> None:
    cat, dog = live.detect(picture(red=204), extras="class_scores").json()["detections"]
    assert cat["class_scores"] == pytest.approx([0.2, 0.8, 0])
    assert dog["class_scores"][dog["label_id"]] == dog["score"]
    assert "class_scores" not in live.detect(picture(red=204)).json()["detections"][0]
    for options, words in (
        ({"extras": "embeddings"}, "'embeddings' is not one of class_scores"),
        ({"extras": "class_scores", "format": "coco", "image_id": 1}, "COCO results have no place"),
    ):
        refused = live.detect(picture(), **options)
        assert (refused.status_code, words in refused.json()["detail"]) == (422, True), refused.text
    refused = live.client.post("/v1/annotate", content=picture(), params={"extras": "class_scores"})
    assert (refused.status_code, "ask /v1/detect" in refused.json()["detail"]) == (422, True)
