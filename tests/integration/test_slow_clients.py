"""Callers who send or read slowly, or not at all, are cut off, and nobody else notices them."""

from __future__ import annotations

import io
import itertools
import select
import socket
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import PIL.Image
import pytest

from service.api import protocol
from tests.fakes import picture
from tests.integration.conftest import Live
from tests.integration.test_errors import connected, read_all

# How a body of each kind begins.
KINDS = {
    "image/png": b"\x89PNG",
    "application/json": b"{",
    "multipart/form-data; boundary=b": b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n',
}


def begun_request(content_type: str, *, path: str = "/v1/detect", size: int = 1000) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {size}\r\n\r\n"
    return head.encode()


def large_picture() -> bytes:
    """One whose drawn form is megabytes: noise does not compress."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_good_traffic_goes_on_beside_idle_and_slow_connections(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_HEAD_TIMEOUT_SECONDS", 3600)
    live = serve(body_timeout_seconds=3600)
    with ExitStack() as stack:
        idle = [stack.enter_context(connected(live)) for _ in range(500)]
        slow = [stack.enter_context(connected(live)) for _ in range(50)]
        for connection, content_type in zip(slow, itertools.cycle(KINDS), strict=False):
            connection.sendall(begun_request(content_type) + KINDS[content_type])
        for _ in range(10):
            assert live.detect(picture()).status_code == 200
            for connection in slow:
                connection.sendall(b"-")
        answered = select.poll()
        for connection in [*idle, *slow]:
            answered.register(connection, select.POLLIN)
        assert answered.poll(0) == []  # all were there the whole time


@pytest.mark.parametrize("content_type", KINDS)
def test_slow_body_of_any_kind_is_cut_off(serve: Callable[..., Live], content_type: str) -> None:
    live = serve(body_timeout_seconds=0.05)
    with connected(live) as connection:
        connection.sendall(begun_request(content_type) + KINDS[content_type])
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("ending", ["", "Connection: close\r\n"])
def test_answer_that_nobody_reads_is_given_up(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(protocol, "_READER_PERIOD_SECONDS", 0.2)
    live = serve()
    body = large_picture()
    with connected(live) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = f"POST /v1/annotate HTTP/1.1\r\nHost: x\r\n{ending}Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        hung_up = select.poll()
        hung_up.register(connection, 0)  # which tells of a reset, and reads nothing
        assert hung_up.poll(60_000)
