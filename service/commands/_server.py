"""A server that stops in good order: it finishes the requests that it accepted and exits with 0. Knows uvicorn and
signals, nothing of what the app does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.api.state import ApiState, Phase
from service.commands._descriptors import raise_limit
from service.commands._preflight import check_address
from service.commands._protocol import BoundedProtocol
from service.errors import ServiceError

logger = logging.getLogger(__name__)

# Longer than the usual 60 seconds of proxies: they, not we, should close an idle connection, for if we do it may be
# while a request is on its way.
_KEEP_ALIVE_SECONDS = 75
# What requests that were given up may take to say so.
_GRACE_SECONDS = 5


def serve_app(app: FastAPI) -> int:
    """Serve until SIGTERM or SIGINT, then finish what was accepted.

    Returns:
        The exit status: 0, or 1 if the models could not be loaded.
    """
    state: ApiState = app.state.api
    state.keys.tell()
    raise_limit()
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
        forwarded_allow_ips=list(state.settings.forwarded_allow_ips or ("127.0.0.1", "::1")),
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
