"""How long what is under way will take, from how fast it has been getting done. The measurement takes in all that a
job waits for (decoding, the device, encoding, several workers, the other priority), so the answer holds whichever of
them is the bottleneck. Knows costs and times only; all runs on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# How much of what was measured the next job leaves in place: about the last twenty count, a few batches.
_MEMORY = 0.95
# What one job is taken to last before the first was measured: so little that the first burst after a start fills the
# queue, as by default it may, rather than being refused by a guess.
_UNMEASURED_SECONDS = 0.3
# So many may be under way on that guess, however short their deadlines are.
_UNMEASURED_JOBS = 8
# A job is taken if it needs at most this share of the time it has: sizes and speeds vary.
SAFETY = 0.75


class Backlog:
    """The jobs of one priority that are under way.

    Args:
        clock: a monotonic time in seconds.

    Attributes:
        count: how many there are.
        cost: of all of them together, in units of the caller's choice.
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
        """Whether a job of this cost is likely to be done in time. What would be alone always is: it has only itself to
        wait for, and without a try nothing would be learned of a device that has become faster.
        """
        is_guess = self._measured_cost == 0 and self.count < _UNMEASURED_JOBS
        return self.count == 0 or is_guess or self.seconds_until_done(cost) <= SAFETY * seconds_left

    def add(self, cost: int) -> None:
        """A job begins."""
        if self.count == 0:
            self._measured_since = self._clock()
        self.count += 1
        self.cost += cost

    def remove(self, cost: int, *, work: int | None) -> None:
        """A job has ended.

        Args:
            cost: what was added.
            work: how much of that was done; None if its end says nothing about the speed, 0 if its time was spent for
                nothing.
        """
        self.count -= 1
        self.cost -= cost
        if work is not None:
            now = self._clock()
            # Only work replaces what was measured before: many deadlines of a millisecond must not make it forgotten.
            memory = _MEMORY if work > 0 else 1.0
            self._measured_cost = memory * self._measured_cost + work
            self._measured_seconds = memory * self._measured_seconds + now - self._measured_since
            self._measured_since = now
