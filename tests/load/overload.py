"""Ten times more than the server can do. `python -m tests.load.overload`"""

from __future__ import annotations

import asyncio
import itertools

from tests.load._server import Server, serving
from tests.load._trial import Load, Verdict, added, detect_requests, mixed_pictures, outcomes, run_trial, tiny_store

MAX_BATCH_SIZE = 4
MAX_QUEUE_SIZE = 16
MOST_LATE = 0.01


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
        verdict.expect(over.throughput_per_second > 0, "some answers with 200")
        batch_ms = 1000 * MAX_BATCH_SIZE / max(over.throughput_per_second, 1e-9)
        under_way_ms = 1000 * callers / max(over.throughput_per_second, 1e-9)
        bound_ms = under_way_ms + batch_ms
        p99_ms = over.latency_ms["p99"]
        verdict.note(f"p99 of the accepted {p99_ms:.0f} ms, bound {under_way_ms:.0f} ms + a batch of {batch_ms:.0f} ms")
        verdict.expect_speed(p99_ms <= bound_ms, f"p99 at most {bound_ms:.0f} ms, got {p99_ms:.0f} ms")

        refused = added(before, after, 'roiserve_rejected_total{reason="overloaded"}')
        verdict.expect(refused == over.outcomes.get("429"), f"every 429 in rejected_total, got {refused:g}")
        answered = added(before, after, 'roiserve_images_total{model="tiny@1",outcome="ok"}')
        verdict.expect(answered == over.outcomes.get("200"), f"every 200 in images_total, got {answered:g}")
        verdict.expect(after['roiserve_queue_depth{model="tiny@1"}'] == 0, "an empty queue afterwards")
    with tiny_store(min_size=min_size) as store, serving(store) as server:
        _overload_with_deadlines(verdict, server, seconds=seconds, factor=factor)
    return verdict


def _overload_with_deadlines(verdict: Verdict, server: Server, *, seconds: float, factor: float) -> None:
    """Pictures of 0.1 to 12 megapixels, one in twenty with a PNG of each mask, and deadlines of which some are shorter
    than the queue: whoever is accepted is answered in time, all but one in a hundred.
    """
    requests = _mixed_requests(server)
    asyncio.run(Load(server, requests).closed(concurrency=8, seconds=seconds / 20))  # warms up
    peak = asyncio.run(Load(server, requests).closed(concurrency=8, seconds=seconds / 3))
    rate = factor * max(peak.throughput_per_second, 1.0)
    over = asyncio.run(Load(server, requests).open(rate=rate, seconds=seconds))
    verdict.note(f"mixed sizes and deadlines, {rate:.0f}/s offered: {outcomes(over)}")
    lost = set(over.outcomes) - {"200", "429", "504"}
    verdict.expect(not lost, f"mixed: an answer 200, 429 or 504 for all, got {lost}")
    late, in_time = over.outcomes.get("504", 0), over.outcomes.get("200", 0)
    verdict.expect_speed(
        late <= MOST_LATE * (late + in_time), f"mixed: at most {MOST_LATE:.0%} of the accepted late, got {late}"
    )


def _mixed_requests(server: Server) -> list[bytes]:
    small, medium, large = (
        mixed_pictures(count, sides=sides) for count, sides in ((12, (300, 400)), (7, (800, 1600)), (1, (3400, 3500)))
    )
    timeouts_ms = itertools.cycle([2000, 5000, 30_000])
    return [
        server.target.request("POST", "/v1/detect", query={"timeout_ms": str(timeout_ms), "masks": masks}, body=picture)
        for pictures, masks in ((small, "rle"), (medium, "rle"), (large, "png"))
        for picture, timeout_ms in zip(pictures, timeouts_ms, strict=False)
    ]


if __name__ == "__main__":
    run_trial(overload)
