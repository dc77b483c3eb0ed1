"""Ten times more than the server can do. `python -m tests.load.overload`"""

from __future__ import annotations

import asyncio

from tests.load._server import serving
from tests.load._trial import Load, Verdict, added, detect_requests, mixed_pictures, outcomes, run_trial, tiny_store

MAX_BATCH_SIZE = 4
MAX_QUEUE_SIZE = 16


def overload(*, seconds: float = 60.0, factor: float = 10.0, min_size: int = 1600) -> Verdict:
    """Every request is answered, 200 or 429, and the device does as much as ever. Nobody waits for longer than what
    may be under way takes, and a batch.

    Args:
        min_size: what pictures are resized to; a slow model, so that the client does not take the processor from it.
    """
    verdict = Verdict(f"open loop at {factor:g}× capacity for {seconds:g} s")
    with (
        tiny_store(min_size=min_size) as store,
        serving(store, max_batch_size=MAX_BATCH_SIZE, max_queue_size=MAX_QUEUE_SIZE) as server,
    ):
        # Of one size, so that every batch takes as long as the others.
        requests = detect_requests(server, mixed_pictures(sides=(300, 300)))
        # As many callers as may be under way: none is refused, and no device waits for work.
        callers = MAX_QUEUE_SIZE + MAX_BATCH_SIZE
        asyncio.run(Load(server, requests).closed(concurrency=callers, seconds=seconds / 20))  # warms up
        peak = asyncio.run(Load(server, requests).closed(concurrency=callers, seconds=seconds / 3))
        capacity = peak.throughput_per_second
        before = server.metrics()
        over = asyncio.run(Load(server, requests).open(rate=factor * capacity, seconds=seconds))
        after = server.metrics()

        verdict.note(f"capacity {capacity:.1f}/s, offered {factor * capacity:.0f}/s: {outcomes(over)}")
        lost = set(over.outcomes) - {"200", "429"}
        verdict.expect(not lost, f"an answer 200 or 429 for all, got {lost}")
        goodput = over.throughput_per_second / capacity
        verdict.note(f"goodput {goodput:.0%} of peak")
        verdict.expect_speed(goodput >= 0.9, f"goodput at least 90 % of peak, got {goodput:.0%}")
        batch_ms = 1000 * MAX_BATCH_SIZE / over.throughput_per_second
        under_way_ms = 1000 * callers / over.throughput_per_second
        bound_ms = under_way_ms + batch_ms
        p99_ms = over.latency_ms["p99"]
        verdict.note(f"p99 of the accepted {p99_ms:.0f} ms, bound {under_way_ms:.0f} ms + a batch of {batch_ms:.0f} ms")
        verdict.expect_speed(p99_ms <= bound_ms, f"p99 at most {bound_ms:.0f} ms, got {p99_ms:.0f} ms")

        refused = added(before, after, 'roiserve_rejected_total{reason="overloaded"}')
        verdict.expect(refused == over.outcomes.get("429"), f"every 429 in rejected_total, got {refused:g}")
        answered = added(before, after, 'roiserve_images_total{model="tiny@1",outcome="ok"}')
        verdict.expect(answered == over.outcomes.get("200"), f"every 200 in images_total, got {answered:g}")
        verdict.expect(after['roiserve_queue_depth{model="tiny@1"}'] == 0, "an empty queue afterwards")
    return verdict


if __name__ == "__main__":
    run_trial(overload)
