"""The knee of servers that are a formula."""

from __future__ import annotations

import pytest

from service.load.knee import Division, Knee, find_knee, suggest, suggest_division, worker_counts
from service.load.summary import Summary


def summary(*, p99_ms: float, throughput: float = 1.0, error_rate: float = 0.0) -> Summary:
    latency_ms = {"p50": p99_ms / 2, "p95": p99_ms, "p99": p99_ms, "max": p99_ms} if error_rate < 1 else {}
    return Summary(10.0, 100, {"200": 100}, throughput, error_rate, latency_ms, 0.0)


class QueueingServer:
    """Serves `capacity` requests a second; its p99 grows as 1 / (1 - load), and at `refuses_from` it refuses."""

    def __init__(self, *, capacity: float, refuses_from: float = 1e9) -> None:
        self.rates: list[float] = []
        self._capacity = capacity
        self._refuses_from = refuses_from

    async def measure(self, rate: float) -> Summary:
        self.rates.append(rate)
        p99_ms = 10 / max(1 - rate / self._capacity, 0.001)
        return summary(p99_ms=p99_ms, throughput=rate, error_rate=0.2 if rate >= self._refuses_from else 0.0)


async def test_knee_is_where_the_p99_is_three_times_that_at_rest() -> None:
    """At rest (10 of 100) the p99 is 11.1 ms; 33.3 ms are reached at 70 a second."""
    server = QueueingServer(capacity=100)
    knee = await find_knee(server.measure, first_rate=10)
    assert knee.bent_at is not None
    assert knee.rate < 70 < knee.bent_at < 1.2 * knee.rate
    assert "the p99 rose" in knee.reason
    assert server.rates[0] == min(server.rates)


async def test_knee_is_what_was_answered_where_chance_sent_less_than_was_intended() -> None:
    """Poisson arrivals: at an intended 5.67 a second, ten seconds may bring 45 requests."""

    async def measure(rate: float) -> Summary:
        return summary(p99_ms=10 if rate < 6 else 100, throughput=0.8 * rate)

    knee = await find_knee(measure, first_rate=1)
    assert knee.bent_at is not None
    assert 6 <= knee.bent_at < 1.2 * 6
    assert 0.7 * 6 < knee.rate < 0.8 * 6


async def test_refusals_are_a_knee_although_the_accepted_are_fast() -> None:
    knee = await find_knee(QueueingServer(capacity=1000, refuses_from=50).measure, first_rate=10)
    assert knee.bent_at is not None
    assert knee.rate < 50 <= knee.bent_at
    assert "20.0% of the requests failed" in knee.reason


@pytest.mark.parametrize("refuses_from", [1, 10])
async def test_server_that_fails_at_rest_has_no_knee(refuses_from: float) -> None:
    knee = await find_knee(QueueingServer(capacity=100, refuses_from=refuses_from).measure, first_rate=10)
    assert (knee.rate, knee.bent_at) == (0.0, 10)


async def test_suggested_settings_follow_from_rate_and_wait() -> None:
    """16 at once bring 40 a second and 8 at once 39, so 8 are enough: a batch takes 8 / 40 = 0.2 s. To answer within
    1.2 s, 1 s may be spent in the queue, in which 40 are served. The last waits 40 / 40 + 0.2 s, twice that is 2.4 s.
    """
    knee = await find_knee(QueueingServer(capacity=40).measure, first_rate=4)
    throughputs = {1: 10, 2: 20, 4: 30, 8: 39, 16: 40}
    closed = {n: summary(p99_ms=100, throughput=throughput) for n, throughput in throughputs.items()}
    suggestion = suggest(closed, knee, max_p99_ms=1200)
    assert suggestion.max_batch_size == 8
    assert suggestion.max_queue_size == 40
    assert suggestion.request_timeout_ms == 3000


async def test_suggestion_does_not_contradict_the_closed_loops() -> None:
    """One caller alone gets the most; a lucky open load with more answers changes nothing about that."""
    throughputs = {1: 4.92, 2: 4.77, 4: 4.52, 8: 4.57}
    closed = {n: summary(p99_ms=300, throughput=throughput) for n, throughput in throughputs.items()}
    assert suggest(closed, Knee(5.67, 7.94, "")).max_batch_size == 1


async def test_suggested_queue_holds_a_batch_at_least() -> None:
    knee = await find_knee(QueueingServer(capacity=40).measure, first_rate=4)
    suggestion = suggest(
        {1: summary(p99_ms=100, throughput=10), 4: summary(p99_ms=100, throughput=40)}, knee, max_p99_ms=1
    )
    assert suggestion.max_queue_size == suggestion.max_batch_size == 4


def division(workers: int, alone_ms: float, rate: float) -> Division:
    return Division(workers, 16 // workers, alone_ms / 2, alone_ms, rate, 1000.0)


def test_the_fewest_workers_that_reach_nearly_the_best_throughput_are_suggested() -> None:
    measured = [division(1, 30, 40), division(2, 40, 70), division(4, 60, 98), division(8, 110, 100)]
    assert suggest_division(measured).workers == 4
    assert suggest_division(measured[:1]).workers == 1


def test_a_limit_for_the_latency_bounds_the_workers() -> None:
    measured = [division(1, 30, 40), division(2, 40, 70), division(4, 60, 98)]
    assert suggest_division(measured, max_p99_ms=50).workers == 2
    assert suggest_division(measured, max_p99_ms=10).workers == 1, "the quickest, where none is quick enough"


@pytest.mark.parametrize(
    ("cores", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])]
)
def test_worker_counts_double_up_to_one_for_each_core(cores: int, counts: list[int]) -> None:
    assert worker_counts(cores) == counts
