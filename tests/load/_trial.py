"""What the trials share: the load, and a verdict. A trial states what must hold, notes what it saw, and prints both as
a row of the table in `docs/reliability.md`; one that finds a promise broken exits with 1.
"""

from __future__ import annotations

import asyncio
import functools
import io
import random
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import PIL.Image
import typer

from service.load.client import Client, Reply
from service.load.generators import closed_loop, open_loop, send_one
from service.load.pictures import endless
from service.load.summary import Record, Summary, summarise
from tests.load._model import write_tiny_model
from tests.load._server import Server

# For requests that outlast several starts of a worker: longer than these take on any machine.
PATIENT_SECONDS = 1800.0

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Verdict:
    """What came of a trial.

    Attributes:
        figures: what was seen, in words.
        broken: the promises that did not hold, with what was seen instead.
        too_slow: those of them that are about speed, which also other work of the machine can break.
    """

    trial: str
    figures: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    too_slow: list[str] = field(default_factory=list)

    def note(self, figure: str) -> None:
        self.figures.append(figure)

    def expect(self, holds: bool, promise: str) -> None:
        if not holds:
            self.broken.append(promise)

    def expect_speed(self, holds: bool, promise: str) -> None:
        if not holds:
            self.too_slow.append(promise)

    def row(self) -> str:
        """As the table has it."""
        broken = [*self.broken, *self.too_slow]
        result = f"**broken**: {'; '.join(broken)}" if broken else "kept"
        return f"| {self.trial} | {'; '.join(self.figures)} | {result} |"


def run_trial(trial: Callable[P, Verdict]) -> None:
    """Make a command of a trial: its parameters are the options."""

    @functools.wraps(trial)
    def command(*args: P.args, **kwargs: P.kwargs) -> None:
        verdict = trial(*args, **kwargs)
        print(verdict.row())
        sys.exit(1 if verdict.broken or verdict.too_slow else 0)

    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(command)
    app()


@contextmanager
def tiny_store(*, min_size: int = 64) -> Iterator[Path]:
    """A model store with `tiny@1`, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="roiserve-store-") as folder:
        write_tiny_model(Path(folder), min_size=min_size)
        yield Path(folder)


def mixed_pictures(count: int = 32, *, seed: int = 0, sides: tuple[int, int] = (48, 320)) -> list[bytes]:
    """JPEGs and PNGs of mixed sizes, with something in them."""
    chance = random.Random(seed)
    pictures = []
    for index in range(count):
        height, width = chance.randint(*sides), chance.randint(*sides)
        coarse = np.random.default_rng(seed + index).integers(0, 256, (6, 8, 3), np.uint8)
        buffer = io.BytesIO()
        picture = PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)
        picture.save(buffer, "PNG" if index % 4 == 0 else "JPEG")
        pictures.append(buffer.getvalue())
    return pictures


def detect_requests(
    server: Server, pictures: Sequence[bytes], *, headers: Mapping[str, str] | None = None
) -> list[bytes]:
    """A request for each picture."""
    return [server.target.request("POST", "/v1/detect", headers=headers, body=picture) for picture in pictures]


class Load:
    """Requests of one kind to one server, over connections of their own.

    Args:
        requests: sent in random order, each as often as the others.
        on_reply: sees each request's answer.
    """

    def __init__(
        self,
        server: Server,
        requests: Sequence[bytes],
        *,
        on_reply: Callable[[bytes, Reply], None] | None = None,
        timeout_seconds: float = 60.0,
        seed: int = 0,
    ) -> None:
        self.record = Record()
        self._client = Client(server.target, timeout_seconds=timeout_seconds)
        self._requests = endless(requests, seed=seed)
        self._on_reply = on_reply

    async def closed(self, *, concurrency: int, seconds: float) -> Summary:
        async with self._client:
            await closed_loop(self._send, self.record, concurrency=concurrency, seconds=seconds)
        return summarise(self.record.samples)

    async def open(self, *, rate: float, seconds: float) -> Summary:
        async with self._client:
            await open_loop(self._send, self.record, rate=rate, seconds=seconds)
        return summarise(self.record.samples)

    async def during(self, event: Awaitable[T], *, concurrency: int) -> tuple[Summary, T]:
        """A closed loop that lasts as long as something else does."""
        now = asyncio.get_running_loop().time
        begin = now()
        happening = asyncio.ensure_future(event)

        async def caller() -> None:
            while not happening.done():
                await send_one(self._send, self.record, begin=begin, intended=now())

        async with self._client, asyncio.TaskGroup() as callers:
            for _ in range(concurrency):
                callers.create_task(caller())
        return summarise(self.record.samples), await happening

    async def _send(self) -> int:
        request = next(self._requests)
        reply = await self._client.send(request)
        if self._on_reply is not None:
            self._on_reply(request, reply)
        return reply.status


def added(before: Mapping[str, float], after: Mapping[str, float], name: str) -> float:
    """By how much the series whose names begin so grew, all together."""
    return sum(value - before.get(series, 0.0) for series, value in after.items() if series.startswith(name))


def outcomes(summary: Summary) -> str:
    return ", ".join(f"{count}×{outcome}" for outcome, count in summary.outcomes.items()) or "nothing sent"
