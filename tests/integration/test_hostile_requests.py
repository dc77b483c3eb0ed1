"""Callers who mean harm, or whose software does, get an answer that blames them, and nobody else notices."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.api import protocol
from service.api.schemas import Problem
from tests.fakes import picture
from tests.integration.conftest import Live
from tests.integration.test_errors import connected, good_load, read_all

HOSTILE = Path(__file__).parent.parent.parent.parent / "shared" / "hostile"
GOOD = picture(red=204)
FORM = (
    b'--xyz\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    + GOOD
    + b'\r\n--xyz\r\nContent-Disposition: form-data; name="masks"\r\n\r\nnone\r\n--xyz--\r\n'
)
JSON = json.dumps({"image": base64.b64encode(GOOD).decode(), "masks": "none"}).encode()
KINDS = {"multipart/form-data; boundary=xyz": FORM, "application/json": JSON, "image/png": GOOD}
IN_TIME = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_odd_and_broken_files_are_answered_or_refused_and_good_ones_go_on(live: Live) -> None:
    if not HOSTILE.is_dir():
        pytest.skip("../shared/hostile is not there")
    paths = [HOSTILE / entry["path"] for entry in json.loads((HOSTILE / "manifest.json").read_text())["files"]]
    with good_load(live):
        answers = {path: live.detect(path.read_bytes(), "application/octet-stream") for path in paths}
    assert len(answers) > 200
    assert {answer.status_code for answer in answers.values()} == {200, 413, 415, 422}


@pytest.mark.parametrize("content_type", KINDS)
@given(data=st.data())
@IN_TIME
def test_damaged_body_is_never_our_fault(live: Live, content_type: str, data: st.DataObject) -> None:
    body = bytearray(KINDS[content_type])
    for _ in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.integers(0, len(body)))
        end = start + data.draw(st.integers(0, 20))
        body[start:end] = data.draw(st.binary(max_size=20))
    assert live.detect(bytes(body), content_type).status_code in (200, 413, 415, 422)


@given(name=st.text(max_size=20), value=st.text(max_size=20))
@IN_TIME
def test_invented_option_is_never_our_fault(live: Live, name: str, value: str) -> None:
    form = live.client.post("/v1/detect", files={"image": ("a", GOOD)}, data={name: value})
    query = live.client.post("/v1/detect", content=GOOD, params={name: value})
    encoded = json.dumps({"image": base64.b64encode(GOOD).decode(), name: value})
    as_json = live.client.post("/v1/detect", content=encoded, headers={"Content-Type": "application/json"})
    assert {form.status_code, query.status_code, as_json.status_code} <= {200, 422}


def assert_refused(answer: bytes, status: int, code: str, words: str) -> None:
    """What the protocol refuses, before the app sees it, looks like any other error."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    problem = Problem.model_validate_json(body)
    assert (problem.status, problem.code) == (status, code)
    assert words in problem.detail
    for header in (
        "content-type: application/problem+json",
        f"x-request-id: {problem.request_id}",
        "connection: close",
    ):
        assert header.encode() in head.splitlines()


HEAD = b"GET /healthz HTTP/1.1\r\n"
UPLOAD = b"POST /v1/detect HTTP/1.1\r\nHost: x\r\n"
MALFORMED: dict[str, tuple[bytes, int, str, str]] = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\r\n\r\n", 400, "malformed_request", "expected a request in HTTP/1.1:"),
    "target beyond ASCII": (
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        400,
        "malformed_request",
        "expected a request in HTTP/1.1",
    ),
    "no host": (HEAD + b"\r\n", 400, "malformed_request", "one Host header, got 0"),
    "two hosts": (HEAD + b"Host: a\r\nHost: b\r\n\r\n", 400, "malformed_request", "one Host header, got 2"),
    "host of a page": (HEAD + b'Host: x"><script>\r\n\r\n', 400, "malformed_request", "not a host and port"),
    "proxy": (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "malformed_request", "CONNECT"),
    "many headers": (HEAD + b"Host: x\r\n" + b"X:\r\n" * 200 + b"\r\n", 431, "headers_too_large", "at most 200"),
    "coding": (
        UPLOAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        501,
        "unsupported_transfer_coding",
        "'chunked'",
    ),
    "two codings": (
        UPLOAD + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        501,
        "unsupported_transfer_coding",
        "'chunked'",
    ),
    "chunk size": (UPLOAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "malformed_request", "chunk"),
    "both lengths": (
        UPLOAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
        "malformed_request",
        "expected a request in HTTP/1.1:",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request_is_a_problem_document_too(live: Live, name: str) -> None:
    sent, status, code, words = MALFORMED[name]
    with connected(live) as connection:
        connection.sendall(sent)
        assert_refused(read_all(connection), status, code, words)


@pytest.mark.parametrize(
    "flood", [b"3;" + b"a" * 1_000_000, b"0" * 1_000_000, b"1\r\nx\r\n" * 200_000, b"1;a=b\r\nx\r\n" * 100_000]
)
def test_chunks_that_are_mostly_framing_are_cut_off(live: Live, flood: bytes) -> None:
    with connected(live) as connection:
        connection.sendall(UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            connection.sendall(flood)
            assert_refused(read_all(connection), 400, "malformed_request", "send larger chunks")
        except ConnectionError:
            pass  # reset while it was sending
    assert live.client.get("/healthz").status_code == 200


def test_small_chunks_of_a_good_picture_are_taken(live: Live) -> None:
    size = b"%x\r\n" % 8
    assert len(GOOD) > 100
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (GOOD[i : i + 8] for i in range(0, len(GOOD), 8)))
    assert size in chunks
    with connected(live) as connection:
        connection.sendall(UPLOAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_trailers_are_no_headers(serve: Callable[..., Live]) -> None:
    live = serve(api_keys="secret")
    with connected(live) as connection:
        head = UPLOAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + b"3\r\nabc\r\n0\r\nX-API-Key: secret\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    "following",
    [b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: ", b"nonsense\r\n\r\n", b"GET /healthz HTTP/1.1\r\n\r\n"],
    ids=["incomplete", "malformed", "without host"],
)
def test_what_follows_a_request_does_not_take_its_answers_place(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch, following: bytes
) -> None:
    monkeypatch.setattr(protocol, "_HEAD_TIMEOUT_SECONDS", 0.2)
    live = serve()
    live.predictor.device_is_free.clear()
    with connected(live) as connection:
        connection.sendall(UPLOAD + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD + following)
        assert live.predictor.device_is_busy.wait(60)
        connection.settimeout(0.4)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(60)
        live.release_device()
        answers = read_all(connection)
    assert answers.startswith(b"HTTP/1.1 200 ")
    assert answers.count(b"HTTP/1.1 ") == 2
    assert b'"detections"' in answers
    assert b"HTTP/1.1 40" in answers


def test_broken_body_of_a_request_that_waits_for_its_turn_leaves_the_first_answer(serve: Callable[..., Live]) -> None:
    live = serve()
    live.predictor.device_is_free.clear()
    broken = UPLOAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    with connected(live) as connection:
        connection.sendall(UPLOAD + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD + broken)
        assert live.predictor.device_is_busy.wait(60)
        live.release_device()
        answers = read_all(connection)
    assert answers.startswith(b"HTTP/1.1 200 ")
    assert_refused(answers[answers.rindex(b"HTTP/1.1 ") :], 400, "malformed_request", "chunk")


def test_requests_far_ahead_of_their_answers_are_cut_off(live: Live) -> None:
    with connected(live) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" * 5000)
        answers = read_all(connection)
    assert answers.count(b"HTTP/1.1 200 OK") == 101
    assert answers.count(b"HTTP/1.1 ") == 102
    assert b"at most 100 requests ahead" in answers


def test_endless_headers_are_cut_off(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_HEAD_TIMEOUT_SECONDS", 3600)  # for their size, not for their slowness
    with connected(live) as connection, pytest.raises(ConnectionError):
        while True:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 100_000)
    assert live.client.get("/healthz").status_code == 200


def test_whole_head_over_the_limit_is_refused_although_it_comes_in_one_piece(live: Live) -> None:
    for extra in (b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 70_000, b"GET /healthz?" + b"x" * 70_000 + b" HTTP/1.1"):
        with connected(live) as connection:
            connection.sendall(extra + b"\r\n\r\n")
            answer = read_all(connection)
        assert_refused(answer, 431, "headers_too_large", "exceed 65536 bytes")


UPGRADE = UPLOAD + b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


@pytest.mark.parametrize("cut", [0, 1, len(UPLOAD) + 50, len(UPLOAD) + 60, len(UPGRADE) + 22, len(UPGRADE) + 30])
def test_offer_to_upgrade_costs_no_body_wherever_it_is_cut(live: Live, cut: int) -> None:
    sent = UPGRADE + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD
    with connected(live) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(sent[:cut])
        live.client.get("/healthz")  # by then the server has read that
        connection.sendall(sent[cut:])
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_offer_to_upgrade_behind_another_request_costs_no_body(live: Live) -> None:
    first = UPLOAD + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD
    with connected(live) as connection:
        connection.sendall(first + UPGRADE + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD)
        assert read_all(connection).count(b"HTTP/1.1 200 ") == 2


def test_body_that_speaks_of_upgrades_stays_as_it_is(live: Live) -> None:
    body = b"abc\r\nupgrade: " + b"x" * 25
    with connected(live) as connection:
        connection.sendall(UPLOAD + b"Content-Length: %d\r\n\r" % len(body))
        live.client.get("/healthz")
        connection.sendall(b"\n" + body + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = read_all(connection)
    assert b"HTTP/1.1 200 " in answers
    assert b"HTTP/1.1 400 " not in answers


def test_websockets_are_refused_without_advice_to_install_them(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    upgrade = b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    with connected(live) as connection:
        connection.sendall(upgrade)
        assert connection.recv(1000).startswith(b"HTTP/1.1 404 ")
    assert "pip install" not in caplog.text


@pytest.mark.parametrize(("sent", "answer"), [(b"", b""), (b"GET /healthz HTT", b"HTTP/1.1 408 Request Timeout\r\n")])
def test_slow_headers_are_cut_off(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch, sent: bytes, answer: bytes
) -> None:
    live = serve()
    monkeypatch.setattr(protocol, "_HEAD_TIMEOUT_SECONDS", 0.05)
    with connected(live) as connection:
        connection.sendall(sent)
        assert read_all(connection)[: len(b"HTTP/1.1 408 Request Timeout\r\n")] == answer


def test_slow_headers_on_a_kept_connection_are_cut_off(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = serve()
    with connected(live) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        monkeypatch.setattr(protocol, "_HEAD_TIMEOUT_SECONDS", 0.05)
        connection.sendall(b"GET /healthz HTT")
        assert_refused(read_all(connection), 408, "headers_timeout", "not complete after 0.05 seconds")


def test_long_values_are_not_echoed(live: Live) -> None:
    body = {"image": base64.b64encode(GOOD).decode(), "masks": "x" * 100_000, "y" * 100_000: 1}
    response = live.client.post("/v1/detect", json=body)
    assert response.status_code == 422
    assert len(response.content) < 1000


def test_absolute_and_odd_targets_are_answered(live: Live) -> None:
    for target in (b"http://elsewhere/healthz", b"//healthz", b"/%00", b"/%ff", b"/v1/models/%2e%2e", b"/docs/..%2fx"):
        with connected(live) as connection:
            connection.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            status = int(read_all(connection).split()[1])
        assert status in (200, 404)


def test_thousand_fields_are_not_a_form_of_ours(live: Live) -> None:
    response: httpx.Response = live.client.post(
        "/v1/detect", files={"image": ("a", GOOD)}, data={f"field{index}": "x" for index in range(1001)}
    )
    assert response.status_code == 422
    assert len(response.content) < 1000
