"""Estimates how long the jobs under way will take, from their measured throughput. The measurement covers everything a
job waits for (decoding, the device, encoding, several workers, the other priority), so the estimate holds whichever of
them is the bottleneck. Knows costs and times only; everything runs on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# Weight of the old measurements after each new one: about the last twenty jobs count, which is a few batches.
_MEMORY = 0.95
# Assumed duration of one job before the first is measured. Low enough that, by default, the first burst after a start
# can fill the queue instead of being refused on a guess.
_UNMEASURED_SECONDS = 0.3
# How many jobs may be under way on that guess alone, however short their deadlines are.
_UNMEASURED_JOBS = 8
# A job is accepted if it needs at most this share of the time it has: sizes and speeds vary.
SAFETY = 0.6


class Backlog:
    """The jobs of one priority that are under way.

    Args:
        clock: a monotonic time in seconds.

    Attributes:
        count: how many places they take: one each, but for jobs that make several entries of an image.
        cost: their total cost, in units of the caller's choice.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.count = 0
        self.cost = 0
        self._measured_cost = 0.0
        self._measured_seconds = 0.0
        self._measured_since = 0.0

    def seconds_until_done(self, cost: int) -> float:
        """How long a job of this cost would take now, with all that is under way before it."""
        if self._measured_cost == 0:
            return (self.count + 1) * _UNMEASURED_SECONDS
        return (self.cost + cost) * self._measured_seconds / self._measured_cost

    def is_in_time(self, cost: int, seconds_left: float) -> bool:
        """Whether a job of this cost is likely to be done in time. A job that would be alone always counts as in time:
        it waits for nothing else, and if it were refused, we would never notice that a device has become faster.
        """
        is_guess = self._measured_cost == 0 and self.count < _UNMEASURED_JOBS
        return self.count == 0 or is_guess or self.seconds_until_done(cost) <= SAFETY * seconds_left

    def add(self, cost: int, *, places: int = 1) -> None:
        """A job begins."""
        if self.count == 0:
            self._measured_since = self._clock()
        self.count += places
        self.cost += cost

    def remove(self, cost: int, *, work: int | None, places: int = 1) -> None:
        """A job has ended.

        Args:
            cost: the cost passed to `add`, and `places` likewise.
            work: how much of it was done; None if the way it ended says nothing about the speed, 0 if its time was
                wasted.
        """
        self.count -= places
        self.cost -= cost
        if work is not None:
            now = self._clock()
            # Only real work replaces older measurements: many deadlines of a millisecond must not erase them.
            memory = _MEMORY if work > 0 else 1.0
            self._measured_cost = memory * self._measured_cost + work
            self._measured_seconds = memory * self._measured_seconds + now - self._measured_since
            self._measured_since = now
