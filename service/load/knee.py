"""Where a server bends: the highest rate at which answers still come as fast as at rest, and the settings that follow
from it. Called by the command `bench`. Knows figures only: whoever calls it sends the load.

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

# More at once is not worth the wait when it brings less than this part of the best throughput.
_WORTHWHILE = 0.95
# How long a queue may make a caller wait if nobody says: so many times the p99 at rest.
_WAIT = 10.0
_TIMEOUT_RESERVE = 2.0


@dataclass(frozen=True, slots=True)
class Knee:
    """Where a server bends.

    Attributes:
        rate: the highest that was borne; 0.0 if none was.
        bent_at: the lowest that was not; None if all were.
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
    borne, bent, why = first_rate, None, "no rate that was tried bent it"
    for _ in range(_MOST_STEPS):
        rate = borne * _GROWTH
        if reason := bend(await measure(rate), rest):
            bent, why = rate, reason
            break
        borne = rate
    if bent is None:
        return Knee(borne, None, why)
    for _ in range(_REFINEMENTS):
        rate = math.sqrt(borne * bent)
        if reason := bend(await measure(rate), rest):
            bent, why = rate, reason
        else:
            borne = rate
    return Knee(borne, bent, why)


def bend(summary: Summary, rest: Summary) -> str | None:
    """Why this is more than the server bears, or None. One that cannot keep up shows it in the p99, for its answers
    come later and later as long as the load lasts.

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

    * `max_batch_size`: the least number of callers at once that brings nearly the best throughput; a larger batch makes
      each of its members wait for the others and brings nothing.
    * `max_queue_size`: Little's law, rate x wait: so many that the last one admitted is still answered within
      `max_p99_ms` (unset: ten times the p99 at rest).
    * `request_timeout_ms`: twice what a request waits that is admitted last, in whole seconds.

    Args:
        closed: the closed loops by concurrency; needs concurrency 1, with answers.
    """
    best_rate = max(max(summary.throughput_per_second for summary in closed.values()), knee.rate)
    worthwhile = [n for n, one in closed.items() if one.throughput_per_second >= _WORTHWHILE * best_rate]
    max_batch_size = min(worthwhile, default=max(closed))
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
