"""Both kinds of client against the same service: the real app over real HTTP, with a small fake model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from roiserve_client import AsyncClient, Client, Outcome
from tests.integration.conftest import live, serve

__all__ = ["live", "serve"]


class Driver:
    """Calls `Client`, or `AsyncClient` with a loop of its own, so that each test is written once."""

    def __init__(self, kind: str, stack: ExitStack, url: str, **settings: Any) -> None:
        self._runner: asyncio.Runner | None = None
        self.client: Client | AsyncClient
        if kind == "sync":
            self.client = stack.enter_context(Client(url, **settings))
        else:
            self._runner = stack.enter_context(asyncio.Runner())
            self.client = client = AsyncClient(url, **settings)
            stack.callback(lambda: self._runner and self._runner.run(client.close()))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.client, name)
        return method if self._runner is None else lambda *args, **options: self._run(method(*args, **options))

    def many(self, *args: Any, **options: Any) -> list[Outcome]:
        """All outcomes of `detect_many`, in the order of the images."""
        client = self.client
        if isinstance(client, Client):
            outcomes = list(client.detect_many(*args, **options))
        else:

            async def collect() -> list[Outcome]:
                return [one async for one in client.detect_many(*args, **options)]

            outcomes = self._run(collect())
        return sorted(outcomes, key=lambda one: one.index)

    def _run(self, coroutine: Any) -> Any:
        assert self._runner is not None
        return self._runner.run(coroutine)


Connect = Callable[..., Driver]


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes a client of each kind for a URL."""
    with ExitStack() as stack:
        yield lambda url, **settings: Driver(request.param, stack, url, **settings)
