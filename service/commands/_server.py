"""A server that leaves in good order: it finishes what it accepted and exits with 0. Used by `roiserve serve`; knows
uvicorn and signals, nothing of what the app does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.state import ApiState, Phase
from service.commands._preflight import check_address
from service.errors import ServiceError

logger = logging.getLogger(__name__)

# Longer than the usual 60 seconds of proxies: they, not we, should close an idle connection, for if we do it may be
# while a request is on its way.
_KEEP_ALIVE_SECONDS = 75
# What requests that were given up may take to say so.
_GRACE_SECONDS = 5
# A request line with headers that browsers, proxies and tools send; tokens and cookies included, it is a few kilobytes.
_MAX_HEAD_BYTES = 64 * 1024
_TOO_LONG_HEAD = f"The request's headers exceed {_MAX_HEAD_BYTES} bytes."
_HEAD_TIMEOUT_SECONDS = 10.0
_UPGRADE = re.compile(rb"(\r\n)upgrade:", re.IGNORECASE)
# How much of an answer a caller has to take in how long: far less than the slowest telephone does.
_READER_PERIOD_SECONDS = 30.0
_LEAST_READ_BYTES = 64 * 1024


def serve_app(app: FastAPI) -> int:
    """Serve until SIGTERM or SIGINT, then finish what was accepted.

    Returns:
        The exit status: 0, or 1 if the models could not be loaded.
    """
    state: ApiState = app.state.api
    state.keys.tell()
    DrainingServer(server_config(app), state).run()
    status = 0 if state.lifecycle.failure is None else 1
    logger.info("stopped", extra={"fields": {"status": status}})
    if state.lifecycle.gave_up:
        # Python would wait for the thread that is still at the work which was given up.
        os._exit(status)
    return status


def server_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn is to serve our app."""
    state: ApiState = app.state.api
    return uvicorn.Config(
        app,
        host=state.settings.host,
        port=state.settings.port,
        lifespan="on",
        ws="none",
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(state.settings.drain_timeout_seconds) + _GRACE_SECONDS,
    )


class DrainingServer(uvicorn.Server):
    """A server that leaves in good order: at the first signal not ready, then no new connections, then an answer for
    what was accepted; at the second signal at once, with status 1. It also leaves when the models cannot be loaded.
    """

    def __init__(self, config: uvicorn.Config, state: ApiState) -> None:
        super().__init__(config)
        self._settings = state.settings
        self._lifecycle = state.lifecycle
        self._keys = state.keys
        self._told_at: float | None = None
        self._under_way: int | None = None
        self._is_to_reload_keys = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals from before the models load. Uvicorn's own raises them again at the end: no exit with 0."""
        handlers = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        if self._keys.have_files:
            handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._reload_keys)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to leave; leave at once if that has begun."""
        if self._told_at is not None:
            os._exit(1)
        self._told_at = time.monotonic()
        # Logged by `on_tick`: this handler may have interrupted the writing of a log line.
        self._under_way = self._lifecycle.requests_under_way
        self._lifecycle.phase = Phase.DRAINING

    def _reload_keys(self, sig: int, frame: FrameType | None) -> None:
        # Done by `on_tick`, for the same reason.
        self._is_to_reload_keys = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to leave; asked ten times a second."""
        if self._is_to_reload_keys:
            self._is_to_reload_keys = False
            self._keys.reload()
        if self._under_way is not None:
            fields = {
                "requests_under_way": self._under_way,
                "delay_seconds": self._settings.drain_delay_seconds,
                "timeout_seconds": self._settings.drain_timeout_seconds,
            }
            logger.info("draining", extra={"fields": fields})
            self._under_way = None
        if self._told_at is not None and time.monotonic() >= self._told_at + self._settings.drain_delay_seconds:
            return True
        return self._lifecycle.failure is not None or await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; uvicorn ends the process if it cannot, with the bare exception: we say it in words."""
        uvicorn_logger = logging.getLogger("uvicorn.error")
        uvicorn_logger.addFilter(_is_no_os_error)
        try:
            await super().startup(sockets)
        except SystemExit:
            try:
                check_address(self._settings.host, self._settings.port)
            except ServiceError as error:
                logger.error(str(error))
            raise SystemExit(1) from None
        finally:
            uvicorn_logger.removeFilter(_is_no_os_error)
        self._lifecycle.url = self._url()

    def _url(self) -> str:
        """Where a browser on this machine finds us, also if we listen on all of its addresses."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new connections, wait for the requests under way, and give up those that take too long."""
        timer = asyncio.get_running_loop().call_later(self._settings.drain_timeout_seconds, self._lifecycle.give_up)
        await super().shutdown(sockets)
        timer.cancel()


def _is_no_os_error(record: logging.LogRecord) -> bool:
    """Uvicorn logs the bare exception when it cannot listen; we say the same in words."""
    return not isinstance(record.msg, OSError)


class BoundedProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, which by itself waits for ever for the head of a request, and holds any amount of it, and for
    a caller to take its answer, also when it has closed the connection.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _parsed_bytes = 0
    _reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """A caller is there, and shall say what it wants."""
        super().connection_made(transport)
        self._await_head()

    def on_message_begin(self) -> None:
        """A request begins; on a connection that was kept alive, a further one."""
        super().on_message_begin()
        self._parsed_bytes = 0
        self._await_head()

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        self._count_parsed(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._count_parsed(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is here; its body has limits of its own."""
        self._head_is_here()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Let the head grow up to its limit; what of it the parser still holds counts here."""
        if self._head_timer is not None:
            # Whom we do not follow to another protocol goes on in this one; the parser would drop the body.
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(rb"\1x-upgrade:", head) + end + rest
        super().data_received(data)
        if self._head_timer is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._cut_off(_TOO_LONG_HEAD)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, or too long a one: the parser knows only that we stopped it."""
        super().send_400_response(_TOO_LONG_HEAD if self._parsed_bytes > _MAX_HEAD_BYTES else msg)

    def connection_lost(self, exc: Exception | None) -> None:
        """The caller has gone."""
        self._head_is_here()
        self._stop_awaiting_reader()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The caller does not take its answer as fast as we give it."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """It has taken nearly all."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_awaiting_reader()

    def on_response_complete(self) -> None:
        """An answer was written, the last one perhaps."""
        super().on_response_complete()
        self._await_reader_of_the_rest()

    def timeout_keep_alive_handler(self) -> None:
        """No further request came."""
        super().timeout_keep_alive_handler()
        self._await_reader_of_the_rest()

    def shutdown(self) -> None:
        """The server stops."""
        super().shutdown()
        self._await_reader_of_the_rest()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: a websocket is refused as any other request for a route that is not there."""

    def _count_parsed(self, size: int) -> None:
        self._parsed_bytes += size
        if self._parsed_bytes > _MAX_HEAD_BYTES:
            raise ValueError(_TOO_LONG_HEAD)  # which ends the parsing

    def _await_head(self) -> None:
        if self._head_timer is None:
            message = f"The request's headers were not complete after {_HEAD_TIMEOUT_SECONDS:g} seconds."
            self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_SECONDS, self._cut_off, message)

    def _head_is_here(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _await_reader_of_the_rest(self) -> None:
        """A connection that we closed stays until the rest of the answer was taken."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size() > 0:
            self._await_reader()

    def _await_reader(self) -> None:
        if self._reader_timer is None:
            size = self.transport.get_write_buffer_size()
            self._reader_timer = self.loop.call_later(_READER_PERIOD_SECONDS, self._look_at_reader, size)

    def _look_at_reader(self, size_before: int) -> None:
        """Nothing was written since: what the caller took is what is missing."""
        self._reader_timer = None
        if size_before - self.transport.get_write_buffer_size() < _LEAST_READ_BYTES:
            # With a reset, or the system would go on holding what it has of the answer.
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self._await_reader()

    def _stop_awaiting_reader(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _cut_off(self, message: str) -> None:
        has_spoken = self._head_bytes > 0
        self._head_is_here()
        if has_spoken:
            self.send_400_response(message)
        else:
            self.transport.close()
