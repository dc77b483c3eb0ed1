"""SIGTERM under load. `python -m tests.load.sigterm`"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from service.load.summary import Summary
from tests.load._server import Server, serving
from tests.load._trial import Load, Verdict, detect_requests, mixed_pictures, outcomes, run_trial, tiny_store

CONCURRENCY = 32
DRAIN_DELAY_SECONDS = 0.3
DRAIN_TIMEOUT_SECONDS = 15.0
# How often a load balancer asks whether the server is ready.
PROBE_SECONDS = 0.05


@dataclass(frozen=True)
class Exit:
    """How a server ended, how many requests were under way when it stopped listening, and what all callers saw until
    the balancer sent them elsewhere.
    """

    status: int
    seconds: float
    in_flight: int
    summary: Summary


def sigterm(*, times: int = 10, load_seconds: float = 2.0, min_size: int = 600) -> Verdict:
    """A load balancer sends requests for as long as `/readyz` says yes: all of them are answered, and the exit is 0.
    There are so many at once that some are still under way when the server takes no connections any more.

    Args:
        load_seconds: how long each server serves before it is told to end.
        min_size: what pictures are resized to; large enough that the queue is longer than the delay.
    """
    verdict = Verdict(f"SIGTERM under load {times} times")
    with tiny_store(min_size=min_size) as store:
        exits = [_serve_and_end(store, load_seconds) for _ in range(times)]
    requests = sum(one.summary.requests for one in exits)
    failed = [outcomes(one.summary) for one in exits if set(one.summary.outcomes) != {"200"}]
    slowest = max(one.seconds for one in exits)
    statuses = sorted({one.status for one in exits})
    verdict.note(f"{requests} requests, {len(failed)} of {times} runs with a failure; exit status {statuses}")
    in_flight = [one.in_flight for one in exits]
    verdict.note(f"{min(in_flight)} to {max(in_flight)} requests under way when it stopped listening")
    verdict.expect(min(in_flight) > 0, "requests under way when it stopped listening, else nothing was tried")
    verdict.note(f"{slowest:.1f} s from the signal to the exit at most")
    verdict.expect(not failed, f"200 for every request, got {failed}")
    verdict.expect(statuses == [0], f"exit status 0, got {statuses}")
    limit = DRAIN_DELAY_SECONDS + DRAIN_TIMEOUT_SECONDS
    verdict.expect_speed(slowest <= limit, f"an exit within {limit:g} s, got {slowest:.1f} s")
    return verdict


def _serve_and_end(store: Path, load_seconds: float) -> Exit:
    with serving(store, drain_delay_seconds=DRAIN_DELAY_SECONDS, drain_timeout_seconds=DRAIN_TIMEOUT_SECONDS) as server:
        load = Load(server, detect_requests(server, mixed_pictures()))
        summary, told_at, in_flight = asyncio.run(_load_and_tell(server, load, load_seconds))
        status = server.process.wait(DRAIN_DELAY_SECONDS + DRAIN_TIMEOUT_SECONDS + 30)
        return Exit(status, time.monotonic() - told_at, in_flight, summary)


async def _load_and_tell(server: Server, load: Load, load_seconds: float) -> tuple[Summary, float, int]:
    """What callers saw, when the server was told to end, and how many requests were under way when it stopped
    listening.
    """
    telling = load.during(_tell_and_wait_until_not_ready(server, load, load_seconds), concurrency=CONCURRENCY)
    summary, (told_at, counting) = await telling
    return summary, told_at, await counting


async def _tell_and_wait_until_not_ready(
    server: Server, load: Load, load_seconds: float
) -> tuple[float, asyncio.Task[int]]:
    await asyncio.sleep(load_seconds)
    server.process.terminate()
    told_at = time.monotonic()
    counting = asyncio.create_task(_count_after(load, DRAIN_DELAY_SECONDS))
    while await asyncio.to_thread(server.status, "/readyz") == 200:
        await asyncio.sleep(PROBE_SECONDS)
    return told_at, counting


async def _count_after(load: Load, seconds: float) -> int:
    await asyncio.sleep(seconds)
    return load.record.in_flight


if __name__ == "__main__":
    run_trial(sigterm)
