"""Very many requests of mixed sizes. `python -m tests.load.endurance`"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass

import psutil

from tests.load._server import Server, serving
from tests.load._trial import Load, Verdict, added, detect_requests, mixed_pictures, outcomes, run_trial, tiny_store

CONCURRENCY = 16
MOST_GROWTH = 0.02
LOOKS = 100


@dataclass(frozen=True)
class Look:
    """One process at one moment."""

    resident_bytes: int
    descriptors: int
    threads: int


def endurance(*, requests: int = 100_000, warm_up: float = 0.2) -> Verdict:
    """Memory, descriptors and threads stay as they are.

    Args:
        warm_up: part of the requests after which they are as they are to stay.
    """
    verdict = Verdict(f"{requests} requests of mixed sizes")
    with tiny_store() as store, serving(store) as server:
        before = server.metrics()
        load = Load(server, detect_requests(server, mixed_pictures(64)))
        summary, looks = asyncio.run(load.during(_watch(server, load, requests), concurrency=CONCURRENCY))
        after = server.metrics()

    verdict.note(f"{outcomes(summary)} in {summary.seconds:.0f} s")
    verdict.expect(set(summary.outcomes) == {"200"}, f"200 for every request, got {outcomes(summary)}")
    for name, all_looks in looks.items():
        settled = all_looks[int(warm_up * len(all_looks)) :]
        tenth = max(1, len(settled) // 10)
        first, last = settled[:tenth], settled[-tenth:]
        resident = [statistics.median(look.resident_bytes for look in some) for some in (first, last)]
        growth = resident[1] / resident[0] - 1
        verdict.note(f"{name}: {resident[0] / 2**20:.1f} → {resident[1] / 2**20:.1f} MiB ({growth:+.2%})")
        verdict.expect(growth <= MOST_GROWTH, f"{name} grows by at most {MOST_GROWTH:.0%}, got {growth:+.2%}")
        for kind in ("descriptors", "threads"):
            counts = [max(getattr(look, kind) for look in some) for some in (first, last)]
            verdict.note(f"{counts[0]} → {counts[1]} {kind}")
            verdict.expect(counts[1] <= counts[0], f"{name} gets no more {kind}, got {counts}")
    answered = added(before, after, 'roiserve_images_total{model="tiny@1",outcome="ok"}')
    verdict.expect(answered == summary.requests, f"every answer counted, got {answered:g}")
    restarts = added(before, after, "roiserve_worker_restarts_total")
    verdict.expect(restarts == 0, f"no worker restarted, got {restarts:g}")
    return verdict


async def _watch(server: Server, load: Load, requests: int) -> dict[str, list[Look]]:
    """Look at every process at even steps of the requests, until all were answered."""
    processes = {"server": psutil.Process(server.process.pid)}
    processes |= {f"worker {number}": worker for number, worker in enumerate(server.workers(), 1)}
    looks: dict[str, list[Look]] = {name: [] for name in processes}
    for step in range(1, LOOKS + 1):
        while len(load.record.samples) < step * requests / LOOKS:
            await asyncio.sleep(0.05)
        for name, process in processes.items():
            with process.oneshot():
                looks[name].append(Look(process.memory_info().rss, process.num_fds(), process.num_threads()))
    return looks


if __name__ == "__main__":
    run_trial(endurance)
