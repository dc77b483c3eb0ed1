"""A server that shuts down gracefully: it finishes the requests that it accepted and exits with 0. Knows uvicorn and
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

from service.api.descriptors import raise_limit
from service.api.protocol import BoundedProtocol
from service.api.state import ApiState, Phase
from service.commands._preflight import check_address
from service.errors import ServiceError

logger = logging.getLogger(__name__)

# Longer than the usual 60 seconds of proxies: they should close idle connections, not we, since a request may be on its
# way when we do.
_KEEP_ALIVE_SECONDS = 75
# How long requests that were given up may take to answer that.
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
        # Otherwise Python would wait for a thread that is still doing the work that was given up.
        os._exit(status)
    return status


def server_config(app: FastAPI) -> uvicorn.Config:
    """Uvicorn's configuration for our app."""
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
    """A server that drains before it exits. At the first signal it reports not ready, then takes no new connections,
    then answers what it has accepted; at the second signal it exits at once, with status 1. It also stops if the models
    cannot be loaded.
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
        """Handle signals, from before the models load. Uvicorn's own version reraises them at the end, so the exit
        status would not be 0.
        """
        handlers = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        if self._keys.have_files:
            handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._reload_keys)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; if that has begun already, exit at once."""
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
        """Whether to stop; uvicorn asks ten times a second."""
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
        """Listen. If that fails, uvicorn logs the bare exception and ends the process; we log the reason in words."""
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
        """The URL for a browser on this machine, even if we listen on all of its addresses."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no new connections, wait for the requests under way, and cancel those that take too long."""
        timer = asyncio.get_running_loop().call_later(self._settings.drain_timeout_seconds, self._lifecycle.give_up)
        await super().shutdown(sockets)
        timer.cancel()


def _is_no_os_error(record: logging.LogRecord) -> bool:
    """Filters out the bare exception that uvicorn logs when it cannot listen; we log the reason in words."""
    return not isinstance(record.msg, OSError)
