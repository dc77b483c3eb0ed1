"""Servers of this machine that are started only to be measured: the same settings from the environment, another number
of workers each time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from service.errors import ServiceError

if TYPE_CHECKING:
    from service.load.client import Target

_POLL_SECONDS = 0.2
_STOP_SECONDS = 60.0
_LOG_LINES = 5


@asynccontextmanager
async def local_server(workers: int, *, start_seconds: float) -> AsyncIterator[Target]:
    """Start a server with so many workers on a free port of this machine, and stop it at the end.

    Args:
        start_seconds: how long it may take until it is ready.

    Raises:
        ServiceError: it ends, or is not ready in time; with the last lines of its log.
    """
    from service.load.client import Target

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"ROISERVE_HOST": "127.0.0.1", "ROISERVE_PORT": str(port), "ROISERVE_WORKERS": str(workers)}
    with tempfile.TemporaryFile("w+") as log:
        server = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "service", "serve", env={**os.environ, **own}, stdout=log, stderr=log
        )
        try:
            target = Target.of_url(f"http://127.0.0.1:{port}")
            try:
                async with asyncio.timeout(start_seconds):
                    while not await _is_ready(target) and server.returncode is None:
                        await asyncio.sleep(_POLL_SECONDS)
            except TimeoutError:
                raise ServiceError(
                    f"the server with {workers} workers was not ready within {start_seconds:g} s"
                ) from None
            if server.returncode is not None:
                log.seek(0)
                lines = "".join(log.readlines()[-_LOG_LINES:])
                raise ServiceError(f"the server with {workers} workers ended with {server.returncode}:\n{lines}")
            yield target
        finally:
            await _stop(server)


async def _is_ready(target: Target) -> bool:
    from service.load.client import Client, NoAnswerError

    try:
        async with Client(target, timeout_seconds=5) as client:
            return (await client.send(target.request("GET", "/readyz"))).status == 200
    except NoAnswerError:
        return False


async def _stop(server: asyncio.subprocess.Process) -> None:
    if server.returncode is not None:
        return
    server.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await server.wait()
    except TimeoutError:
        server.kill()
        await server.wait()
