"""Callers who take their answer are left alone, those who do not are cut off: with a clock that only the test moves."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.api.protocol import _LEAST_READ_BYTES, _READER_PERIOD_SECONDS, BoundedProtocol


class Loop:
    """Holds timers until the test lets time pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[asyncio.TimerHandle, Callable[..., None], tuple[Any, ...]]] = []

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def call_later(self, seconds: float, callback: Callable[..., None], *args: Any) -> asyncio.TimerHandle:
        loop: Any = self
        timer = asyncio.TimerHandle(self.now + seconds, callback, args, loop)
        self.timers.append((timer, callback, args))
        return timer

    def _timer_handle_cancelled(self, timer: asyncio.TimerHandle) -> None:
        """Asyncio tells a loop so."""

    def let_pass(self, seconds: float) -> None:
        self.now += seconds
        due = [entry for entry in self.timers if entry[0].when() <= self.now]
        self.timers = [entry for entry in self.timers if entry[0].when() > self.now]
        for timer, callback, args in due:
            if not timer.cancelled():
                callback(*args)


class Transport:
    """A connection with so many bytes of an answer that the caller has not taken yet."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.unread_bytes = 0
        self.is_closed = self.is_aborted = False

    def get_extra_info(self, name: str) -> socket.socket | None:
        return self.connection if name == "socket" else None

    def get_write_buffer_size(self) -> int:
        return self.unread_bytes

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_aborted = True


Exchange = tuple[BoundedProtocol, Transport, Loop]


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    async def app(scope: object, receive: object, send: object) -> None:
        """Never asked."""

    loop: Any = Loop()
    protocol = BoundedProtocol(uvicorn.Config(app, log_config=None), ServerState(), {}, loop)
    left, right = socket.socketpair()
    with left, right:
        transport: Any = Transport(left)
        protocol.connection_made(transport)
        protocol._stop_awaiting_head()
        yield protocol, transport, loop


def test_caller_who_reads_steadily_is_left_alone_until_it_stops(exchange: Exchange) -> None:
    protocol, transport, loop = exchange
    transport.unread_bytes = 10 * _LEAST_READ_BYTES
    protocol.pause_writing()
    for _ in range(5):
        transport.unread_bytes -= _LEAST_READ_BYTES
        loop.let_pass(_READER_PERIOD_SECONDS)
        assert not transport.is_aborted
    transport.unread_bytes -= _LEAST_READ_BYTES - 1
    loop.let_pass(_READER_PERIOD_SECONDS)
    assert transport.is_aborted


def test_caller_who_has_taken_its_answer_may_wait_with_the_next_request(exchange: Exchange) -> None:
    protocol, transport, loop = exchange
    transport.unread_bytes = 10 * _LEAST_READ_BYTES
    protocol.pause_writing()
    transport.unread_bytes = 0
    protocol.resume_writing()
    loop.let_pass(10 * _READER_PERIOD_SECONDS)
    assert not transport.is_aborted


def test_rest_of_an_answer_does_not_keep_a_closed_connection_for_ever(exchange: Exchange) -> None:
    protocol, transport, loop = exchange
    transport.unread_bytes = 100  # too few to pause anything
    protocol.timeout_keep_alive_handler()
    assert transport.is_closed
    loop.let_pass(_READER_PERIOD_SECONDS)
    assert transport.is_aborted


def test_what_is_overridden_and_used_of_uvicorn_is_there(exchange: Exchange) -> None:
    """Uvicorn promises none of it, so a new version may take it away without an error."""
    overridden = {name for name in vars(BoundedProtocol) if not name.startswith("_")}
    assert "on_headers_complete" in overridden
    assert overridden <= set(dir(HttpToolsProtocol))
    protocol, _, _ = exchange
    protocol.on_message_begin()
    used = {"_unset_keepalive_if_required", "parser", "pipeline", "cycle", "flow", "headers", "url", "server_state"}
    assert used <= set(dir(protocol))
    code = RequestResponseCycle.__init__.__code__
    assert {"more_body", "response_complete", "response_started", "disconnected", "message_event"} <= set(code.co_names)
