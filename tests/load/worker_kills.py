"""A worker is killed every few seconds, under load. `python -m tests.load.worker_kills`"""

from __future__ import annotations

import asyncio
import signal

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

CONCURRENCY = 8
READY_SECONDS = 15.0


def worker_kills(*, kills: int = 20, pause_seconds: float = 2.0) -> Verdict:
    """No caller notices more than a wait, and a new worker serves in seconds.

    Args:
        pause_seconds: from being ready again to the next kill.
    """
    verdict = Verdict(f"kill -9 of a worker {kills} times")
    with tiny_store() as store, serving(store, request_timeout_ms=int(1000 * PATIENT_SECONDS)) as server:
        before = server.metrics()
        load = Load(server, detect_requests(server, mixed_pictures()), timeout_seconds=PATIENT_SECONDS)
        summary, seconds_until_ready = asyncio.run(
            load.during(_kill_workers(server, kills, pause_seconds), concurrency=CONCURRENCY)
        )
        after = server.metrics()

        verdict.note(outcomes(summary))
        verdict.expect(set(summary.outcomes) == {"200"}, f"200 for every request, got {outcomes(summary)}")
        slowest = max(seconds_until_ready)
        verdict.note(f"ready again after {slowest:.1f} s at most; longest answer {summary.latency_ms['max']:.0f} ms")
        verdict.expect_speed(slowest < READY_SECONDS, f"ready again within {READY_SECONDS:g} s, got {slowest:.1f} s")
        restarts = added(before, after, "roiserve_worker_restarts_total")
        verdict.expect(restarts == kills, f"{kills} restarts counted, got {restarts:g}")
        answered = added(before, after, 'roiserve_images_total{model="tiny@1",outcome="ok"}')
        verdict.expect(answered == summary.requests, f"every answer counted once, got {answered:g}")
    return verdict


async def _kill_workers(server: Server, kills: int, pause_seconds: float) -> list[float]:
    """Kill one worker after the other; for each, the seconds until the server was ready again."""
    seconds = []
    for _ in range(kills):
        await asyncio.sleep(pause_seconds)
        worker = server.workers()[0]
        worker.send_signal(signal.SIGKILL)
        await asyncio.to_thread(worker.wait)
        # The supervisor has to notice first: until then the server believes to be ready.
        while worker in server.workers():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        seconds.append(await asyncio.to_thread(server.wait_until_ready))
    return seconds


if __name__ == "__main__":
    run_trial(worker_kills)
