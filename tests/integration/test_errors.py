"""Every row of the error table, over HTTP: the status that tells whom to blame, as a problem document, while good
requests go on unharmed.
"""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from service.api import body
from service.api.json_body import parse_json
from service.api.schemas import Problem
from tests.fakes import FAKE_INFO, POISON, FakePredictor, picture
from tests.integration.conftest import Live

GOOD = picture(red=204)
TIMES = {"request_id": None, "timings_ms": None}


def assert_problem(response: httpx.Response, status: int, code: str, *words: str) -> None:
    """It is the problem document of this error, and its detail says these words."""
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["Content-Type"] == "application/problem+json"
    problem = Problem.model_validate(response.json())
    assert problem.status == status
    assert problem.request_id == response.headers["X-Request-ID"]
    assert "total;dur=" in response.headers["Server-Timing"]
    for word in words:
        assert word in problem.detail


@contextmanager
def good_load(live: Live) -> Iterator[None]:
    """Good requests before, during and after the block, all of which must be answered as ever."""
    alone = live.detect(GOOD).json()["detections"]
    futures: list[Future[httpx.Response]] = [live.in_background(live.detect, GOOD) for _ in range(8)]
    yield
    futures += [live.in_background(live.detect, GOOD) for _ in range(8)]
    for future in futures:
        assert future.result().json()["detections"] == alone


# What is sent to /v1/detect, and what comes back: status, code, words of the detail.
BAD_REQUESTS: dict[str, tuple[Any, ...]] = {
    "empty body": ({"content": b""}, 422, "invalid_request", "empty"),
    "text": ({"content": b"hello", "headers": {"Content-Type": "image/jpeg"}}, 415, "unsupported_image", "PNG"),
    "text by its own type": (
        {"content": b"hello", "headers": {"Content-Type": "text/plain"}},
        415,
        "unsupported_media_type",
        "multipart/form-data",
    ),
    "truncated picture": ({"content": GOOD[:-30]}, 422, "invalid_image", "PNG"),
    "gzip": ({"content": GOOD, "headers": {"Content-Encoding": "gzip"}}, 415, "unsupported_media_type", "gzip"),
    "unknown model": ({"content": GOOD, "params": {"model": "x"}}, 404, "model_not_found", "fake-boxes@1, fake@1"),
    "unknown version": ({"content": GOOD, "params": {"model": "fake@7"}}, 404, "model_not_found", "fake@1"),
    "unknown option": (
        {"content": GOOD, "params": {"score_tresh": 1}},
        422,
        "invalid_request",
        "did you mean 'score_thresh'?",
    ),
    "proposals in the query": (
        {"content": GOOD, "params": {"proposals": "[]"}},
        422,
        "invalid_request",
        "'proposals' goes into the form or the JSON",
    ),
    "threshold above 1": ({"content": GOOD, "params": {"score_thresh": 1.5}}, 422, "invalid_request", "score_thresh"),
    "threshold not a number": (
        {"content": GOOD, "params": {"score_thresh": "nan"}},
        422,
        "invalid_request",
        "score_thresh",
    ),
    "no detections wanted": ({"content": GOOD, "params": {"max_detections": 0}}, 422, "invalid_request", "got '0'"),
    "too many detections": ({"content": GOOD, "params": {"max_detections": 1001}}, 422, "invalid_request", "1000"),
    "unknown label": ({"content": GOOD, "params": {"labels": "cow"}}, 422, "invalid_request", "knows: cat, dog"),
    "unknown mask form": ({"content": GOOD, "params": {"masks": "svg"}}, 422, "invalid_request", "polygons"),
    "masks of a model without": (
        {"content": GOOD, "params": {"masks": "rle", "model": "fake-boxes"}},
        422,
        "invalid_request",
        "faster_rcnn",
    ),
    "option twice in the query": (
        {"content": GOOD, "params": [("masks", "rle"), ("masks", "none")]},
        422,
        "invalid_request",
        "given 2 times",
    ),
    "option in query and form": (
        {"files": {"image": ("a", GOOD)}, "data": {"masks": "rle"}, "params": {"masks": "rle"}},
        422,
        "invalid_request",
        "given twice",
    ),
    "unknown option in a form": (
        {"files": {"image": ("a", GOOD)}, "data": {"thresh": "1"}},
        422,
        "invalid_request",
        "unknown option 'thresh'",
    ),
    "form without image": ({"files": {"photo": ("a", GOOD)}}, 422, "invalid_request", "'photo'"),
    "form with two images": (
        {"files": [("image", ("a", GOOD)), ("image", ("b", GOOD))]},
        422,
        "invalid_request",
        "/v1/detect/batch",
    ),
    "form that is none": (
        {"content": b"xyz", "headers": {"Content-Type": "multipart/form-data; boundary=abc"}},
        422,
        "invalid_request",
        "multipart",
    ),
    "form without boundary": (
        {"content": b"xyz", "headers": {"Content-Type": "multipart/form-data"}},
        422,
        "invalid_request",
        "boundary",
    ),
    "form that breaks off": (
        {
            "content": b'--abc\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nxyz',
            "headers": {"Content-Type": "multipart/form-data; boundary=abc"},
        },
        422,
        "invalid_request",
        "breaks off",
    ),
    "form that is not UTF-8": (
        {
            "content": b'--abc\r\nContent-Disposition: form-data; name="a\xff"\r\n\r\nx\r\n--abc--\r\n',
            "headers": {"Content-Type": "multipart/form-data; boundary=abc"},
        },
        422,
        "invalid_request",
        "UTF-8",
    ),
    "form with the image as text": (
        {"files": {"masks": (None, "none"), "image": (None, "text")}},
        422,
        "invalid_request",
        "the field 'image' came without a filename",
    ),
    "form without any image": (
        {"files": {"masks": (None, "none")}},
        422,
        "invalid_request",
        "expected one image, as the field 'image', got none",
    ),
    "form with a part without a name": (
        {
            "content": b"--abc\r\nContent-Type: image/png\r\n\r\nx\r\n--abc--\r\n",
            "headers": {"Content-Type": "multipart/form-data; boundary=abc"},
        },
        422,
        "invalid_request",
        "has no name",
    ),
    "broken JSON": (
        {"content": b'{"image": ', "headers": {"Content-Type": "application/json"}},
        422,
        "invalid_request",
        "not JSON",
    ),
    "JSON without image": ({"json": {"picture": "x"}}, 422, "invalid_request", '{"image": "..."'),
    "JSON of another kind": ({"json": [1, 2]}, 422, "invalid_request", "JSON object"),
    "broken base64": ({"json": {"image": "a$$b"}}, 422, "invalid_request", "base64"),
    "address": ({"json": {"image": "https://x/a.png"}}, 422, "invalid_request", "addresses are not fetched"),
    "address by another name": ({"json": {"image_url": "https://x"}}, 422, "invalid_request", "got 'image_url'"),
    "form with curl's default type": (
        {"content": b"image=photo.jpg", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        415,
        "unsupported_media_type",
        "-F image=@photo.jpg",
    ),
    "form with a type of an image": (
        {"content": b'--x\r\nContent-Disposition: form-data; name="image"', "headers": {"Content-Type": "image/png"}},
        415,
        "unsupported_media_type",
        "is a multipart form",
    ),
    "picture as JSON": (
        {"content": GOOD, "headers": {"Content-Type": "application/json"}},
        415,
        "unsupported_media_type",
        "is a PNG image",
    ),
    "option in capitals": ({"content": GOOD, "params": {"Masks": "none"}}, 422, "invalid_request", "mean 'masks'?"),
    "label in capitals": ({"content": GOOD, "params": {"labels": "CAT"}}, 422, "invalid_request", "mean 'cat'?"),
    "many unknown options": (
        {"content": GOOD, "params": {f"x{index}": "" for index in range(130)}},
        422,
        "invalid_request",
        "unknown option 'x2'; there are: model, ",
        "; and 127 more",
    ),
    "more options than there are": (
        {"content": GOOD, "params": {f"{index:x}": "" for index in range(9000)}},
        422,
        "invalid_request",
        "more than 1050 options",
    ),
    "labels of another type": (
        {"json": {"image": "", "labels": [1] * 100_000}},
        422,
        "invalid_request",
        "option 'labels'",
    ),
    "many labels": ({"json": {"image": "", "labels": ["cat"] * 1001}}, 422, "invalid_request", "at most 1000 items"),
    "many unknown fields": (
        {"json": {"image": ""} | {f"x{index}": index for index in range(10_000)}},
        422,
        "invalid_request",
        "; and 9997 more",
    ),
    "JSON option of another type": (
        {"json": {"image": base64.b64encode(GOOD).decode(), "score_thresh": "0.5"}},
        422,
        "invalid_request",
        "score_thresh",
    ),
    "body over the limit": ({"content": b"\0" * 1_000_001}, 413, "too_large", "1000001", "1000000"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request_gets_its_own_answer_and_harms_no_other(live: Live, name: str) -> None:
    request, *expected = BAD_REQUESTS[name]
    with good_load(live):
        response = live.client.post("/v1/detect", **request)
    assert_problem(response, *expected)
    assert len(response.content) < 8192


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain;charset=UTF-8", "", "x/y"])
def test_picture_and_json_are_known_by_their_bytes_whatever_a_tool_calls_them(live: Live, kind: str) -> None:
    encoded = json.dumps({"image": base64.b64encode(GOOD).decode(), "masks": "none"}).encode()
    for sent in (GOOD, encoded):
        response = live.client.post("/v1/detect", content=sent, headers={"Content-Type": kind})
        assert response.status_code == 200
        assert ("mask" in response.json()["detections"][0]) == (sent == GOOD)


def test_body_in_no_encoding_may_say_so(live: Live) -> None:
    response = live.client.post("/v1/detect", content=GOOD, headers={"Content-Encoding": "Identity"})
    assert response.status_code == 200


def test_empty_options_count_as_absent(live: Live) -> None:
    empty = dict.fromkeys(("model", "score_thresh", "max_detections", "labels", "masks", "roi_op", "timeout_ms"), "")
    expected = live.detect(GOOD).json()["detections"]
    form = live.client.post("/v1/detect", files={"image": ("a", GOOD)}, data={**empty, "proposals": ""}, params=empty)
    assert form.json()["detections"] == live.detect(GOOD, **empty).json()["detections"] == expected


def test_labels_may_stand_between_commas_unless_one_has_a_comma(serve: Callable[..., Live]) -> None:
    plain, odd = serve(), serve(FakePredictor(replace(FAKE_INFO, labels=("cat, large", "dog"))))
    assert plain.detect(GOOD, labels="cat, dog").json() | TIMES == plain.detect(GOOD).json() | TIMES
    assert [one["label"] for one in odd.detect(GOOD, labels="cat, large").json()["detections"]] == ["cat, large"]
    assert_problem(odd.detect(GOOD, labels="dog,dog"), 422, "invalid_request", "knows no label 'dog,dog'")


def test_body_that_has_come_is_never_too_slow(serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done with a body afterwards, here for ten times as long as it may take to arrive, is not the caller's."""

    def parse_slowly(data: bytes) -> tuple[bytes, dict[str, object]]:
        time.sleep(0.5)
        return parse_json(data)

    monkeypatch.setattr(body, "parse_json", parse_slowly)
    live = serve(body_timeout_seconds=0.05)
    image = base64.b64encode(GOOD + bytes(20_000)).decode()
    assert live.client.post("/v1/detect", json={"image": image}).status_code == 200


def test_long_path_is_not_echoed(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    response = live.client.get(f"/{'é' * 8000}")
    assert_problem(response, 404, "route_not_found")
    assert len(response.content) < 2000


@pytest.mark.parametrize("path", ["/v1/detect/", "/V1/Detect", "/v1/detct"])
def test_path_that_is_nearly_right_is_corrected(live: Live, path: str) -> None:
    assert_problem(live.client.post(path, content=GOOD), 404, "route_not_found", "did you mean /v1/detect?")


@pytest.mark.parametrize("query", ["version=1&version=2", "version=1_0", "version=1&x=1", "versoin=1"])
def test_loading_takes_its_own_option_once(serve: Callable[..., Live], query: str) -> None:
    live = serve(admin_keys="root")
    response = live.client.post(f"/v1/models/fake/load?{query}", headers={"X-API-Key": "root"})
    assert_problem(response, 422, "invalid_request")
    response = live.client.post("/v1/models/fake/unload?x=1", headers={"X-API-Key": "root"})
    assert_problem(response, 422, "invalid_request", "unknown option 'x'; there are: none")


def test_unknown_route_lists_the_known_ones(live: Live) -> None:
    assert_problem(live.client.get("/v9/nothing"), 404, "route_not_found", "/v1/detect", "/readyz")


def test_slash_at_the_end_is_another_route_and_never_a_redirect_to_the_callers_host(live: Live) -> None:
    response = live.client.post("/v1/detect/", content=GOOD, headers={"Host": "evil.example"})
    assert_problem(response, 404, "route_not_found", "/v1/detect")
    assert "location" not in response.headers


def test_wrong_method_says_which_is_right(live: Live) -> None:
    response = live.client.get("/v1/detect")
    assert_problem(response, 405, "method_not_allowed", "POST")
    assert response.headers["Allow"] == "POST"


def test_unknown_model_page_lists_the_known_ones(live: Live) -> None:
    assert_problem(live.client.get("/v1/models/x"), 404, "model_not_found", "fake@1")


def test_endless_body_is_cut_at_the_limit_although_its_length_was_never_told(live: Live) -> None:
    chunks = (b"\0" * 100_000 for _ in range(20))
    assert_problem(live.client.post("/v1/detect", content=chunks), 413, "too_large", "1000000")


def test_declared_length_over_the_limit_is_refused_before_the_body_is_sent(live: Live) -> None:
    with connected(live) as connection:
        connection.sendall(b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_slow_body_is_cut_off(serve: Callable[..., Live]) -> None:
    live = serve(body_timeout_seconds=0.05)
    with connected(live) as connection:
        connection.sendall(b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nslow")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "body_timeout"


def test_missing_and_wrong_keys_are_told_apart(serve: Callable[..., Live]) -> None:
    live = serve(api_keys="alpha,beta", admin_keys="root")
    assert_problem(live.detect(GOOD), 401, "missing_key", "Bearer")
    for header in ({"X-API-Key": "wrong"}, {"Authorization": "Bearer wrong"}, {"X-API-Key": "alph"}):
        response = live.client.post("/v1/detect", content=GOOD, headers=header)
        assert_problem(response, 403, "key_not_allowed", "does not know the key")
    for header in ({"X-API-Key": "beta"}, {"Authorization": "Bearer alpha"}, {"X-API-Key": "root"}):
        assert live.client.post("/v1/detect", content=GOOD, headers=header).status_code == 200


def test_unknown_keys_and_keys_of_users_are_told_apart_where_models_are_loaded(serve: Callable[..., Live]) -> None:
    live = serve(api_keys="alpha", admin_keys="root")
    for key, words in (("wrong", "does not know the key"), ("alpha", "may detect, but not load or unload")):
        response = live.client.post("/v1/models/fake/load", headers={"X-API-Key": key})
        assert_problem(response, 403, "key_not_allowed", words)


def test_keys_of_administrators_alone_leave_detection_open(serve: Callable[..., Live]) -> None:
    live = serve(admin_keys="root")
    assert live.detect(GOOD).status_code == 200
    assert_problem(live.client.post("/v1/models/fake/load"), 401, "missing_key")


@pytest.mark.parametrize("key", ["ключ", "clé à deux mots", "鍵"])
def test_keys_may_be_any_utf8(serve: Callable[..., Live], key: str) -> None:
    live = serve(api_keys=key)
    assert live.client.get("/v1/models", headers=[(b"x-api-key", key.encode())]).status_code == 200


@pytest.mark.parametrize("header", [b"\xff", b"\xc3\x28", b"Bearer \xed\xa0\x80"])
def test_a_key_of_bytes_that_are_no_text_is_an_unknown_key(serve: Callable[..., Live], header: bytes) -> None:
    live = serve(api_keys="ключ")
    for name in (b"x-api-key", b"authorization"):
        response = live.client.get("/v1/models", headers=[(name, header)])
        assert response.status_code in (401, 403)


def test_probes_and_metrics_need_no_key(serve: Callable[..., Live]) -> None:
    live = serve(api_keys="alpha")
    for path in ("/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"):
        assert live.client.get(path).status_code == 200
    assert_problem(live.client.get("/v1/models"), 401, "missing_key")


def test_full_queue_refuses_at_once_and_says_when_to_come_back(serve: Callable[..., Live]) -> None:
    live = serve(max_queue_size=2, max_batch_size=1)
    first = live.hold_device()
    waiting = [live.in_background(live.detect, GOOD) for _ in range(2)]
    live.wait_for_metric('roiserve_queue_depth{model="fake@1"}', 2)
    refused = live.detect(GOOD)
    assert_problem(refused, 429, "overloaded", "the queue is full: 3 images wait or are under way, at most 3")
    assert int(refused.headers["Retry-After"]) >= 1
    live.release_device()
    assert [future.result().status_code for future in (first, *waiting)] == [200, 200, 200]
    assert live.metric('roiserve_rejected_total{reason="overloaded"}') == 1


def test_full_queue_refuses_a_large_body_unread_and_keeps_the_connection_of_a_small_one(
    serve: Callable[..., Live],
) -> None:
    live = serve(max_queue_size=1, max_batch_size=1)
    first = live.hold_device()
    waiting = live.in_background(live.detect, GOOD)
    live.wait_for_metric('roiserve_queue_depth{model="fake@1"}', 1)
    with connected(live) as connection:
        connection.sendall(b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 429"
    refused = live.detect(GOOD)
    assert (refused.status_code, refused.headers.get("connection")) == (429, None)
    live.release_device()
    assert [future.result().status_code for future in (first, waiting)] == [200, 200]
    assert live.metric('roiserve_requests_total{route="/v1/detect",status="429"}') == 2


def test_failing_model_is_503_for_the_image_to_blame_and_200_for_its_batch_mates(serve: Callable[..., Live]) -> None:
    live = serve()
    first = live.hold_device()
    pictures = [GOOD, picture(red=POISON), GOOD]
    sent = [live.in_background(live.detect, one) for one in pictures]
    live.wait_for_metric('roiserve_queue_depth{model="fake@1"}', 3)
    live.release_device()
    good, poisoned, other = (future.result() for future in sent)
    assert first.result().status_code == good.status_code == other.status_code == 200
    assert_problem(poisoned, 503, "inference_failed")
    assert poisoned.headers["Retry-After"] == "1"


def test_deadline_in_the_queue_says_so(serve: Callable[..., Live]) -> None:
    live = serve()
    live.hold_device()
    response = live.detect(GOOD, timeout_ms=1000)
    assert_problem(response, 504, "deadline_exceeded", "'queue'")
    assert response.json()["stage"] == "queue"


def test_deadline_on_the_device_says_so(serve: Callable[..., Live]) -> None:
    live = serve()
    live.predictor.device_is_free.clear()
    assert_problem(live.detect(GOOD, timeout_ms=1500), 504, "deadline_exceeded", "'inference'")


def test_deadline_before_decoding_says_so_and_nothing_is_computed(serve: Callable[..., Live]) -> None:
    live = serve()
    with connected(live) as connection:
        head = "POST /v1/detect?timeout_ms=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        connection.sendall(f"{head}Content-Length: {len(GOOD)}\r\n\r\n".encode())
        live.client.get("/healthz")  # More than a millisecond later the body follows.
        connection.sendall(GOOD)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 504 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["stage"] == "decode"
    assert live.predictor.batches == []


def test_caller_who_hangs_up_costs_the_device_nothing(serve: Callable[..., Live]) -> None:
    live = serve()
    first = live.hold_device()
    with connected(live) as connection:
        head = f"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: {len(GOOD)}\r\n\r\n"
        connection.sendall(head.encode() + GOOD)
        live.wait_for_metric('roiserve_queue_depth{model="fake@1"}', 1)
    live.wait_for_metric('roiserve_cancelled_total{stage="queue"}', 1)
    live.release_device()
    assert first.result().status_code == 200
    assert live.detect(GOOD).status_code == 200
    assert live.predictor.batches == [1, 1]
    live.wait_for_metric('roiserve_requests_total{route="/v1/detect",status="499"}', 1)


def test_caller_who_hangs_up_while_sending_is_counted(serve: Callable[..., Live]) -> None:
    live = serve()
    with connected(live) as connection:
        connection.sendall(b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf")
    live.wait_for_metric('roiserve_cancelled_total{stage="body"}', 1)


def test_early_answer_reaches_a_caller_who_is_still_sending(live: Live) -> None:
    """Without lingering the connection would be reset under the caller's feet, and the answer lost."""
    size = 20_000_000
    with connected(live) as connection:
        connection.sendall(f"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
        connection.sendall(b"\0" * size)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"\r\nconnection: close\r\n" in answer


@contextmanager
def connected(live: Live) -> Iterator[socket.socket]:
    """A bare connection, to send what no client library would."""
    url = httpx.URL(live.url)
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))
