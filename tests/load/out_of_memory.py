"""A device that has no memory for more than two pictures at once. `python -m tests.load.out_of_memory`"""

from __future__ import annotations

import asyncio

from tests.load._faults import MOST_PICTURES
from tests.load._server import serving
from tests.load._trial import Load, Verdict, added, detect_requests, mixed_pictures, outcomes, run_trial, tiny_store

CONCURRENCY = 16


def out_of_memory(*, seconds: float = 20.0) -> Verdict:
    """Batches are halved until they fit; nobody is refused, and no process ends."""
    verdict = Verdict(f"out of memory in every batch of more than {MOST_PICTURES}, for {seconds:g} s")
    with tiny_store() as store, serving(store, fault="memory", max_batch_size=8, max_batch_wait_ms=5) as server:
        before = server.metrics()
        workers = {worker.pid for worker in server.workers()}
        requests = detect_requests(server, mixed_pictures(4, sides=(96, 96)))
        summary = asyncio.run(Load(server, requests).closed(concurrency=CONCURRENCY, seconds=seconds))
        after = server.metrics()

        verdict.note(outcomes(summary))
        verdict.expect(set(summary.outcomes) == {"200"}, f"200 for every request, got {outcomes(summary)}")
        restarts = added(before, after, "roiserve_worker_restarts_total")
        verdict.note(f"{restarts:g} processes restarted")
        verdict.expect(workers == {worker.pid for worker in server.workers()}, "the same processes as before")
        verdict.expect(restarts == 0, f"no restart counted, got {restarts:g}")
        pictures = added(before, after, "roiserve_batch_size_sum")
        batches = added(before, after, "roiserve_batch_size_count")
        verdict.note(f"{pictures / batches:.2f} pictures a batch")
        # How full they are is a matter of load; that none is too large is the promise.
        verdict.expect(pictures / batches <= MOST_PICTURES, f"at most {MOST_PICTURES} pictures a batch")
    return verdict


if __name__ == "__main__":
    run_trial(out_of_memory)
