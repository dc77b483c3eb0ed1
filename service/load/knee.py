"""Find the knee of a server's latency curve: the highest rate that it sustains without slowing down markedly, and the
settings that follow from it. Works on figures only; the caller sends the load. Rates are in requests per second.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from service.load.summary import Summary

# Queueing makes the tail grow as 1 / (1 - load): three times the latency at rest means about two thirds of full load.
BENT_LATENCY = 3.0
BENT_ERROR_RATE = 0.01

_GROWTH = 1.4
_REFINEMENTS = 2
_MOST_STEPS = 40

# A higher concurrency is not worth the wait if a lower one reaches this share of the best throughput.
_WORTHWHILE = 0.95
# Default for the longest wait in the queue, as a multiple of the p99 at rest.
_WAIT = 10.0
_TIMEOUT_RESERVE = 2.0


@dataclass(frozen=True, slots=True)
class Knee:
    """A server's knee.

    Attributes:
        rate: the highest measured rate of answers among the sustained loads, 0.0 if none was sustained. Not the
            intended rate: arrivals are random, and a short load may have far fewer.
        bent_at: the lowest intended rate that was not sustained; None if all were.
        reason: what happened at that rate, in words.
    """

    rate: float
    bent_at: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Server settings that fit the measurements, by name."""

    max_batch_size: int
    max_queue_size: int
    request_timeout_ms: int


async def find_knee(measure: Callable[[float], Awaitable[Summary]], *, first_rate: float) -> Knee:
    """Raise the rate until the server saturates, then narrow down the rate at which it does.

    Args:
        measure: sends an open-loop load at a rate and returns its figures.
        first_rate: low enough that requests hardly overlap; the other rates are compared with it.
    """
    rest = await measure(first_rate)
    if reason := bend(rest, rest):
        return Knee(0.0, first_rate, reason)
    sustained, answered = first_rate, rest.throughput_per_second
    bent, why = math.inf, "no rate that was tried bent it"
    for _ in range(_MOST_STEPS):
        summary = await measure(rate := sustained * _GROWTH)
        if reason := bend(summary, rest):
            bent, why = rate, reason
            break
        sustained, answered = rate, max(answered, summary.throughput_per_second)
    if bent == math.inf:
        return Knee(answered, None, why)
    for _ in range(_REFINEMENTS):
        summary = await measure(rate := math.sqrt(sustained * bent))
        if reason := bend(summary, rest):
            bent, why = rate, reason
        else:
            sustained, answered = rate, max(answered, summary.throughput_per_second)
    return Knee(answered, bent, why)


def bend(summary: Summary, rest: Summary) -> str | None:
    """Why the server does not sustain this load, or None if it does. A server that cannot keep up shows it in its p99,
    because its answers come later and later while the load lasts.

    Args:
        rest: the figures at a rate low enough that requests hardly overlap.
    """
    if not summary.latency_ms:
        return "no request was answered"
    if summary.error_rate > BENT_ERROR_RATE:
        outcomes = ", ".join(f"{count}×{outcome}" for outcome, count in summary.outcomes.items())
        return f"{summary.error_rate:.1%} of the requests failed ({outcomes})"
    p99, p99_at_rest = summary.latency_ms["p99"], rest.latency_ms["p99"]
    if p99 > BENT_LATENCY * p99_at_rest:
        return f"the p99 rose to {p99:.0f} ms, from {p99_at_rest:.0f} ms at rest"
    return None


def suggest(closed: Mapping[int, Summary], knee: Knee, *, max_p99_ms: float | None = None) -> Suggestion:
    """Settings for the server.

    * `max_batch_size`: the lowest concurrency that reaches nearly the best throughput of all closed loops; larger
      batches make requests wait for each other without any gain.
    * `max_queue_size`: Little's law, rate x wait: the last request admitted is still answered within
      `max_p99_ms` (unset: ten times the p99 at rest).
    * `request_timeout_ms`: twice the wait of the last request admitted, in whole seconds.

    Args:
        closed: the closed loops by concurrency; needs concurrency 1, with answers.
    """
    # Only closed loops show the benefit of a batch size; open loops may count for the rate.
    best_of_closed = max(summary.throughput_per_second for summary in closed.values())
    max_batch_size = min(n for n, one in closed.items() if one.throughput_per_second >= _WORTHWHILE * best_of_closed)
    best_rate = max(best_of_closed, knee.rate)
    at_rest_seconds = closed[1].latency_ms["p99"] / 1000
    wait_seconds = _WAIT * at_rest_seconds if max_p99_ms is None else max_p99_ms / 1000
    batch_seconds = max_batch_size / best_rate
    max_queue_size = max(max_batch_size, math.floor(best_rate * (wait_seconds - batch_seconds)))
    longest_wait_seconds = max_queue_size / best_rate + batch_seconds
    return Suggestion(
        max_batch_size=max_batch_size,
        max_queue_size=max_queue_size,
        request_timeout_ms=1000 * math.ceil(_TIMEOUT_RESERVE * longest_wait_seconds),
    )


@dataclass(frozen=True, slots=True)
class Division:
    """The figures of a server that divides the cores among a number of workers.

    Attributes:
        workers: how many.
        threads: of each.
        alone_p50_ms, alone_p99_ms: the latency of a single caller, who waits for nobody else.
        throughput_per_second: with enough callers to keep every worker busy.
        busy_p99_ms: the 99th percentile meanwhile.
    """

    workers: int
    threads: int
    alone_p50_ms: float
    alone_p99_ms: float
    throughput_per_second: float
    busy_p99_ms: float


def suggest_division(divisions: Sequence[Division], *, max_p99_ms: float | None = None) -> Division:
    """The fewest workers that reach nearly the best throughput, since each costs memory for the models and answers a
    single caller with fewer threads.

    Args:
        divisions: at least one.
        max_p99_ms: consider only those that keep to it with a single caller; the quickest if none does.
    """
    quick = [one for one in divisions if max_p99_ms is None or one.alone_p99_ms <= max_p99_ms]
    able = quick or [min(divisions, key=lambda one: one.alone_p99_ms)]
    best = max(one.throughput_per_second for one in able)
    return min((one for one in able if one.throughput_per_second >= _WORTHWHILE * best), key=lambda one: one.workers)


def worker_counts(cores: int) -> Sequence[int]:
    """What to try: 1, 2, 4, … up to one worker for each core."""
    powers = [2**exponent for exponent in range(cores.bit_length()) if 2**exponent < cores]
    return [*powers, cores]
