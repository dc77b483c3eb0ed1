"""SIGTERM under load. `python -m tests.load.sigterm`"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from service.load.summary import Summary
from tests.load._server import Server, serving
from tests.load._trial import Load, Verdict, detect_requests, mixed_pictures, outcomes, run_trial, tiny_store

CONCURRENCY = 8
DRAIN_DELAY_SECONDS = 1.0
DRAIN_TIMEOUT_SECONDS = 15.0
# How often a load balancer asks whether the server is ready.
PROBE_SECONDS = 0.2


@dataclass(frozen=True)
class Exit:
    """How a server ended, and what its callers saw until the balancer sent them elsewhere."""

    status: int
    seconds: float
    summary: Summary


def sigterm(*, times: int = 10, load_seconds: float = 2.0) -> Verdict:
    """A load balancer sends requests for as long as `/readyz` says yes: all of them are answered, and the exit is 0.

    Args:
        load_seconds: how long each server serves before it is told to end.
    """
    verdict = Verdict(f"SIGTERM under load {times} times")
    with tiny_store() as store:
        exits = [_serve_and_end(store, load_seconds) for _ in range(times)]
    requests = sum(one.summary.requests for one in exits)
    failed = [outcomes(one.summary) for one in exits if set(one.summary.outcomes) != {"200"}]
    slowest = max(one.seconds for one in exits)
    statuses = sorted({one.status for one in exits})
    verdict.note(f"{requests} requests, {len(failed)} of {times} runs with a failure; exit status {statuses}")
    verdict.note(f"{slowest:.1f} s from the signal to the exit at most")
    verdict.expect(not failed, f"200 for every request, got {failed}")
    verdict.expect(statuses == [0], f"exit status 0, got {statuses}")
    limit = DRAIN_DELAY_SECONDS + DRAIN_TIMEOUT_SECONDS
    verdict.expect_speed(slowest <= limit, f"an exit within {limit:g} s, got {slowest:.1f} s")
    return verdict


def _serve_and_end(store: Path, load_seconds: float) -> Exit:
    with serving(store, drain_delay_seconds=DRAIN_DELAY_SECONDS, drain_timeout_seconds=DRAIN_TIMEOUT_SECONDS) as server:
        load = Load(server, detect_requests(server, mixed_pictures()))
        summary, told_at = asyncio.run(
            load.during(_tell_and_wait_until_not_ready(server, load_seconds), concurrency=CONCURRENCY)
        )
        status = server.process.wait(DRAIN_DELAY_SECONDS + DRAIN_TIMEOUT_SECONDS + 30)
        return Exit(status, time.monotonic() - told_at, summary)


async def _tell_and_wait_until_not_ready(server: Server, load_seconds: float) -> float:
    await asyncio.sleep(load_seconds)
    server.process.terminate()
    told_at = time.monotonic()
    while await asyncio.to_thread(server.status, "/readyz") == 200:
        await asyncio.sleep(PROBE_SECONDS)
    return told_at


if __name__ == "__main__":
    run_trial(sigterm)
