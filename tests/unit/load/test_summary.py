"""Figures that can be checked on paper."""

from __future__ import annotations

import pytest

from service.load.summary import Sample, percentile, summarise


def answered(latency_seconds: float, *, at: float = 0.0, outcome: str = "200") -> Sample:
    return Sample(intended_at=at, sent_at=at, finished_at=at + latency_seconds, outcome=outcome)


def test_percentile_is_the_smallest_number_that_so_many_do_not_exceed() -> None:
    numbers = list(range(1, 101))
    assert [percentile(numbers, part) for part in (0.0, 0.5, 0.95, 0.99, 1.0)] == [1, 50, 95, 99, 100]
    assert percentile([7], 0.99) == 7
    assert percentile([1, 2, 3], 0.5) == 2


def test_latency_counts_from_the_intended_start() -> None:
    """A request that should have gone at 1 s, went at 3 s and was answered at 4 s made its caller wait for 3 s."""
    summary = summarise([Sample(intended_at=1, sent_at=3, finished_at=4, outcome="200")])
    assert summary.latency_ms == {"p50": 3000, "p95": 3000, "p99": 3000, "max": 3000}
    assert summary.lateness_ms == 2000


def test_errors_are_counted_by_outcome_and_make_no_answer_look_fast() -> None:
    slow = [answered(1.0, at=second) for second in range(6)]
    quick = [answered(0.001, outcome=outcome) for outcome in ("429", "429", "timeout", "closed")]
    summary = summarise([*slow, *quick])
    assert summary.outcomes == {"200": 6, "429": 2, "closed": 1, "timeout": 1}
    assert summary.error_rate == pytest.approx(0.4)
    assert summary.latency_ms["p50"] == 1000
    assert summary.throughput_per_second == 1.0  # six answers from 0 s to 6 s


def test_what_was_meant_to_start_before_a_time_is_left_out() -> None:
    summary = summarise([answered(9.0, at=0), answered(1.0, at=5), answered(1.0, at=6)], since=5)
    assert (summary.requests, summary.seconds, summary.throughput_per_second) == (2, 2, 1)


def test_nothing_sent_and_nothing_answered_have_figures_too() -> None:
    assert summarise([]).requests == 0
    failed = summarise([answered(1.0, outcome="503")])
    assert (failed.latency_ms, failed.error_rate, failed.throughput_per_second) == ({}, 1.0, 0.0)
