"""Pictures that kill the worker while it reads their headers, beside good traffic. `python -m
tests.load.header_death`
"""

from __future__ import annotations

import asyncio

from service.load.client import Client
from tests.load._faults import deadly_header
from tests.load._server import Server, serving
from tests.load._trial import (
    PATIENT_SECONDS,
    Load,
    Verdict,
    added,
    detect_requests,
    mixed_pictures,
    outcomes,
    run_trial,
    tiny_store,
)

CONCURRENCY = 4
# Beside others once, and alone twice.
MOST_DEATHS = 3


def header_death(*, bad: int = 10) -> Verdict:
    """However many come, each is refused, nobody else notices, and the service lives.

    Args:
        bad: deadly pictures, one after the other, each other bytes; the first is sent once more at the end.
    """
    verdict = Verdict(f"{bad} pictures that kill the worker in their headers, beside good traffic")
    with (
        tiny_store() as store,
        serving(store, fault="header", request_timeout_ms=int(1000 * PATIENT_SECONDS)) as server,
    ):
        before = server.metrics()
        load = Load(server, detect_requests(server, mixed_pictures()), timeout_seconds=PATIENT_SECONDS)
        summary, statuses = asyncio.run(load.during(_send_bad(server, bad), concurrency=CONCURRENCY))
        after = server.metrics()
        verdict.expect(server.process.poll() is None, "the server still runs")
        verdict.expect(server.status("/healthz") == 200, "/healthz says 200 at the end")

    verdict.note(f"{outcomes(summary)} for the good ones; {statuses.count(422)}×422 for the deadly ones")
    verdict.expect(set(summary.outcomes) == {"200"}, f"200 for all good ones, got {outcomes(summary)}")
    verdict.expect(statuses == [422] * (bad + 1), f"422 for each deadly one, got {statuses}")
    restarts = added(before, after, "roiserve_worker_restarts_total")
    verdict.note(f"{restarts:g} workers lost")
    most = MOST_DEATHS * bad  # the one that is sent again costs none
    verdict.expect(2 * bad <= restarts <= most, f"{2 * bad} to {most} workers lost, got {restarts:g}")
    return verdict


async def _send_bad(server: Server, bad: int) -> list[int]:
    requests = detect_requests(server, [deadly_header(index) for index in (*range(bad), 0)])
    async with Client(server.target, timeout_seconds=PATIENT_SECONDS) as client:
        return [(await client.send(request)).status for request in requests]


if __name__ == "__main__":
    run_trial(header_death)
