"""Serves metrics and probes on a separate port, for networks in which callers must not see them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI

from service.api import health, metrics
from service.api.errors import add_error_handlers
from service.api.middleware import RequestMiddleware
from service.api.protocol import BoundedProtocol
from service.api.state import ApiState


@asynccontextmanager
async def management_server(state: ApiState) -> AsyncIterator[None]:
    """Serve metrics and probes while entered, if the settings name a port; also while the service drains.

    Raises:
        OSError: the port is taken.
    """
    if state.settings.admin_port is None:
        yield
        return
    config = uvicorn.Config(
        management_app(state),
        host=state.settings.host,
        port=state.settings.admin_port,
        lifespan="off",
        ws="none",
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve())
    try:
        yield
    finally:
        server.should_exit = True
        await serving


def management_app(state: ApiState) -> FastAPI:
    """An app with the metrics and the probes of a running service."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.api = state
    app.add_middleware(RequestMiddleware, state=state)
    for router in (health.router, metrics.router):
        app.include_router(router)
    add_error_handlers(app, state.metrics, paths=["/healthz", "/readyz", "/metrics"])
    return app


class _Server(uvicorn.Server):
    """A server that leaves signals to the server of the API."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
