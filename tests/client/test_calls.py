"""The calls of both clients, over real HTTP."""

from __future__ import annotations

import asyncio
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import numpy as np
import PIL.Image
import pytest

from roiserve_client import (
    AnnotateOptions,
    Answer,
    AsyncClient,
    Client,
    DetectOptions,
    ImageError,
    ProblemError,
    UnexpectedAnswerError,
)
from service.api.options import AnnotateParameters, BodyParameters, DetectParameters
from tests.client.conftest import Connect
from tests.fakes import POISON, picture
from tests.integration.conftest import Live

PICTURE = picture(red=204)
PIXELS = np.full((48, 64, 3), [204, 0, 0], np.uint8)


def test_answer_is_what_the_server_said(live: Live, connect: Connect) -> None:
    answer: Answer = connect(live.url).detect(PICTURE, request_id="mine", model="fake@1", score_thresh=0.5)
    assert (answer.request_id, answer.model, answer.version, answer.roi_op) == ("mine", "fake", 1, "roi_align")
    assert (answer.image.width, answer.image.height, answer.image.orientation_applied) == (64, 48, False)
    [cat] = answer.detections
    assert (cat.label, cat.label_id, cat.box) == ("cat", 1, (0, 0, 32, 48))
    assert cat.score == pytest.approx(0.8)
    assert answer.boxes.tolist() == [[0, 0, 32, 48]]
    assert (answer.labels, answer.label_ids.tolist(), len(answer.scores)) == (["cat"], [1], 1)
    assert set(answer.timings_ms) == {"decode", "queue", "inference", "encode", "total"}
    said = live.detect(PICTURE, score_thresh=0.5).json()["detections"]
    assert answer.document["detections"] == said


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "bytearray", "file", "array", "pil", "cmyk"])
def test_every_kind_of_image_is_sent(live: Live, connect: Connect, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PICTURE)
    images: dict[str, Any] = {
        "path": path,
        "str": str(path),
        "bytes": PICTURE,
        "bytearray": bytearray(PICTURE),
        "file": io.BytesIO(PICTURE),
        "array": PIXELS,
        "pil": PIL.Image.fromarray(PIXELS),
        "cmyk": PIL.Image.fromarray(PIXELS).convert("CMYK"),
    }
    answer = connect(live.url).detect(images[kind], masks="none")
    assert answer.scores == pytest.approx([0.8, 0.08])


@pytest.mark.parametrize("name", [b'a "b" \xc3\xbc.png', b"\xff\xfe.png", b"line\r\nbreak.png"])
def test_file_may_be_called_anything(live: Live, connect: Connect, tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(PICTURE)
    assert connect(live.url).detect(path).labels == ["cat", "dog"]


def test_class_scores_come_on_request(live: Live, connect: Connect) -> None:
    cat, _ = connect(live.url).detect(PICTURE, extras="class_scores").detections
    assert len(cat.class_scores) == 3
    assert cat.class_scores[cat.label_id] == cat.score
    assert connect(live.url).detect(PICTURE).detections[0].class_scores is None


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32; from 0 to 1 it is \(255 \* pixels\)"),
        (np.zeros((4, 4, 5), np.uint8), r"got \(4, 4, 5\)"),
        (np.zeros((0, 4), np.uint8), r"got \(0, 4\)"),
        (io.StringIO("text"), "binary mode"),
        (7, "a path, bytes, a binary file, a NumPy array or a PIL image, got int"),
        (PIL.Image.new("F", (4, 4)), "mode F"),
    ],
)
def test_what_is_no_image_is_refused_before_it_is_sent(connect: Connect, image: Any, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        connect("http://127.0.0.1:9").detect(image)


def test_missing_file_is_the_error_that_python_has_for_it(connect: Connect) -> None:
    with pytest.raises(FileNotFoundError):
        connect("http://127.0.0.1:9").detect("no/such.png")


def test_options_are_those_of_the_server() -> None:
    ours = set(get_type_hints(DetectOptions)), set(get_type_hints(AnnotateOptions))
    theirs = {*DetectParameters.model_fields, *BodyParameters.model_fields} - {"timeout_ms"}
    assert ours == (theirs, {*AnnotateParameters.model_fields, *BodyParameters.model_fields} - {"timeout_ms"})


def test_every_option_reaches_the_server(serve: Callable[..., Live], connect: Connect) -> None:
    client = connect(serve(allow_roi_op_override=True).url)
    answer = client.detect(
        PICTURE,
        labels=["cat", "dog"],
        max_detections=np.int64(1),
        nms_thresh=0.5,
        class_agnostic_nms=True,
        roi_op="roi_pool",
        intensity="stretch",
        masks=None,
        proposals=np.array([[1, 2, 30, 40], [5, 6, 7, 8]]),
    )
    assert answer.boxes.tolist() == [[1, 2, 30, 40]]
    assert (answer.roi_op, answer.document["image"]["intensity"]) == ("roi_pool", "stretch")


def test_unknown_option_is_explained_by_the_server(live: Live, connect: Connect) -> None:
    with pytest.raises(ProblemError, match="did you mean 'score_thresh'"):
        connect(live.url).detect(PICTURE, score_tresh=0.5)


def test_empty_list_of_labels_does_not_mean_all(live: Live, connect: Connect) -> None:
    with pytest.raises(ValueError, match="labels: expected at least one"):
        connect(live.url).detect(PICTURE, labels=[])


def test_batch_has_an_answer_or_an_error_for_each(live: Live, connect: Connect) -> None:
    client = connect(live.url)
    cat, broken, dog = client.detect_batch([PICTURE, b"broken", PIXELS], max_detections=1, masks="crop")
    assert (cat.labels, dog.labels) == (["cat"], ["cat"])
    assert (broken.status, broken.code) == (415, "unsupported_image")
    assert client.detect_batch([]) == []


def test_annotated_picture_is_a_picture(live: Live, connect: Connect) -> None:
    client = connect(live.url)
    assert PIL.Image.open(io.BytesIO(client.annotate(PICTURE))).format == "PNG"
    jpeg = client.annotate(PICTURE, format="jpeg", draw="boxes,labels")
    assert PIL.Image.open(io.BytesIO(jpeg)).format == "JPEG"


def test_models_are_described(live: Live, connect: Connect) -> None:
    fake, boxes = connect(live.url).models()
    assert (fake.name, fake.is_default, fake.labels, fake.has_masks) == ("fake", True, ("cat", "dog"), True)
    assert (boxes.name, boxes.is_default, boxes.has_masks) == ("fake-boxes", False, False)


def test_problem_carries_what_the_server_said(live: Live, connect: Connect) -> None:
    with pytest.raises(ProblemError) as raised:
        connect(live.url).detect(PICTURE, model="x", request_id="mine")
    error = pickle.loads(pickle.dumps(raised.value))
    assert (error.status, error.code, error.request_id) == (404, "model_not_found", "mine")
    assert error.detail.startswith("no model 'x' is loaded")
    assert str(error) == f"404 model_not_found: {error.detail} (request mine)"


def test_image_that_breaks_the_model_is_tried_once_more_and_no_more(live: Live, connect: Connect) -> None:
    before = live.metric('roiserve_requests_total{route="/v1/detect",status="503"}')
    with pytest.raises(ProblemError) as raised:
        connect(live.url).detect(picture(red=POISON))
    assert raised.value.code == "inference_failed"
    assert live.metric('roiserve_requests_total{route="/v1/detect",status="503"}') == before + 2


@pytest.mark.parametrize("text", ["schl\u00fcssel", "alpha\n", "a\x00"])
def test_what_no_header_can_hold_is_refused_in_words(live: Live, connect: Connect, text: str) -> None:
    with pytest.raises(ValueError, match="api_key: expected printable ASCII"):
        connect(live.url, api_key=text)
    with pytest.raises(ValueError, match="request_id: expected printable ASCII"):
        connect(live.url).detect(PICTURE, request_id=text)


def test_call_may_have_all_the_time_there_is(live: Live, connect: Connect) -> None:
    assert connect(live.url, timeout=float("inf")).detect(PICTURE).labels == ["cat", "dog"]


def test_key_is_sent(serve: Callable[..., Live], connect: Connect) -> None:
    url = serve(api_keys="alpha").url
    assert connect(url, api_key="alpha").detect(PICTURE).labels == ["cat", "dog"]
    for key, code in ((None, "missing_key"), ("beta", "key_not_allowed")):
        with pytest.raises(ProblemError) as raised:
            connect(url, api_key=key).detect(PICTURE)
        assert raised.value.code == code


def test_prefix_of_a_proxy_is_kept() -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={"models": []})

    with Client("https://a.example/roiserve", transport=httpx.MockTransport(answer)) as client:
        assert client.models() == []
    assert str(asked[0].url) == "https://a.example/roiserve/v1/models"
    assert asked[0].headers["User-Agent"].startswith("roiserve-client/")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", "http://a:b"])
def test_address_is_checked(connect: Connect, url: str) -> None:
    with pytest.raises(ValueError, match="expected a URL such as"):
        connect(url)


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (200, b"<html>log in", "expected RoIServe's answer to GET /v1/models, got text/html: b'<html>log in'"),
        (302, b"", "status 302|got text/html"),
        (200, b'{"models": [{"name": "x"}]}', "expected RoIServe's answer"),
    ],
)
def test_answer_of_something_else_is_named(status: int, content: bytes, words: str) -> None:
    page = httpx.MockTransport(
        lambda request: httpx.Response(status, content=content, headers={"Content-Type": "text/html"})
    )
    with Client(transport=page) as client, pytest.raises(UnexpectedAnswerError, match=words):
        client.models()


def test_error_page_of_a_proxy_is_quoted() -> None:
    page = httpx.MockTransport(lambda request: httpx.Response(413, text="<h1>Too large</h1>"))
    with Client(transport=page) as client, pytest.raises(ProblemError, match="413 http_413: <h1>Too large"):
        client.models()


async def test_calls_of_one_async_client_overlap(serve: Callable[..., Live]) -> None:
    live = serve(max_batch_size=4)
    first = live.hold_device()
    async with AsyncClient(live.url) as client:
        calls = [asyncio.create_task(client.detect(PICTURE)) for _ in range(4)]
        while await waiting(live) < 4:
            await asyncio.sleep(0.01)
        live.release_device()
        assert [answer.batch_size for answer in await asyncio.gather(*calls)] == [4] * 4
    assert first.result().status_code == 200


async def waiting(live: Live) -> float:
    return await asyncio.to_thread(live.metric, 'roiserve_queue_depth{model="fake@1"}')
