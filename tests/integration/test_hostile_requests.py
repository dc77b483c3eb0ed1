"""Callers who mean harm, or whose software does, get an answer that blames them, and nobody else notices."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.commands import _server
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


def test_endless_headers_are_cut_off(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_server, "_HEAD_TIMEOUT_SECONDS", 3600)  # for their size, not for their slowness
    with connected(live) as connection, pytest.raises(ConnectionError):
        while True:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 100_000)
    assert live.client.get("/healthz").status_code == 200


def test_whole_head_over_the_limit_is_refused_although_it_comes_in_one_piece(live: Live) -> None:
    for extra in (b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 70_000, b"GET /healthz?" + b"x" * 70_000 + b" HTTP/1.1"):
        with connected(live) as connection:
            connection.sendall(extra + b"\r\n\r\n")
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.endswith(b"The request's headers exceed 65536 bytes.")


def test_offer_to_upgrade_costs_no_body(live: Live) -> None:
    body = picture()
    head = b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\n"
    length = b"HTTP2-Settings: AAMAAABk\r\nContent-Length: %d\r\n\r\n" % len(body)
    with connected(live) as connection:
        connection.sendall(head + length + body)
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_websockets_are_refused_without_advice_to_install_them(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    upgrade = b"GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    with connected(live) as connection:
        connection.sendall(upgrade)
        assert connection.recv(1000).startswith(b"HTTP/1.1 404 ")
    assert "pip install" not in caplog.text


@pytest.mark.parametrize(("sent", "answer"), [(b"", b""), (b"GET /healthz HTT", b"HTTP/1.1 400 Bad Request\r\n")])
def test_slow_headers_are_cut_off(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch, sent: bytes, answer: bytes
) -> None:
    live = serve()
    monkeypatch.setattr(_server, "_HEAD_TIMEOUT_SECONDS", 0.05)
    with connected(live) as connection:
        connection.sendall(sent)
        assert read_all(connection)[: len(b"HTTP/1.1 400 Bad Request\r\n")] == answer


def test_slow_headers_on_a_kept_connection_are_cut_off(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = serve()
    with connected(live) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        monkeypatch.setattr(_server, "_HEAD_TIMEOUT_SECONDS", 0.05)
        connection.sendall(b"GET /healthz HTT")
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")


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
