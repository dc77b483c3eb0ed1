"""Where a server bends: the highest rate at which answers still come as fast as at rest, and the settings that follow
from it. Knows figures only: its caller sends the load.

Rates are in requests a second.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from service.load.summary import Summary

# Queueing makes the tail grow as 1 / (1 - load): three times what it is at rest is about two thirds of the way up.
BENT_LATENCY = 3.0
BENT_ERROR_RATE = 0.01

_GROWTH = 1.4
_REFINEMENTS = 2
_MOST_STEPS = 40

# More at once is not worth the wait when fewer bring this part of the best throughput.
_WORTHWHILE = 0.95
# How long a queue may make a caller wait unless it is given: so many times the p99 at rest.
_WAIT = 10.0
_TIMEOUT_RESERVE = 2.0


@dataclass(frozen=True, slots=True)
class Knee:
    """Where a server bends.

    Attributes:
        rate: the highest rate of answers among the loads that were sustained, 0.0 if none was. Not the intended rate:
            arrivals are random, and a short load may have far fewer.
        bent_at: the lowest intended rate that was not sustained; None if all were.
        reason: what happened there, in words.
    """

    rate: float
    bent_at: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Settings of the server that fit what was measured, by their names."""

    max_batch_size: int
    max_queue_size: int
    request_timeout_ms: int


async def find_knee(measure: Callable[[float], Awaitable[Summary]], *, first_rate: float) -> Knee:
    """Raise the rate until the server bends, then close in on the rate at which it does.

    Args:
        measure: sends an open-loop load of a rate and returns its figures.
        first_rate: one at which requests hardly meet; what it measures is what the others are compared with.
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
    """Why this is more than the server sustains, or None. A server that cannot keep up shows it in its p99, since its
    answers come later and later as long as the load lasts.

    Args:
        rest: the figures at a rate at which requests hardly meet.
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

    * `max_batch_size`: the least number of callers at once that brings nearly the best throughput of all closed loops;
      a larger batch makes each of its members wait for the others and brings nothing.
    * `max_queue_size`: Little's law, rate x wait: so many that the last one admitted is still answered within
      `max_p99_ms` (unset: ten times the p99 at rest).
    * `request_timeout_ms`: twice what the last request admitted waits, in whole seconds.

    Args:
        closed: the closed loops by concurrency; needs concurrency 1, with answers.
    """
    # Only closed loops tell what a batch of some size brings; the open ones may count for the rate.
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
