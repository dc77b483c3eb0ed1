"""How much may share a batch, as far as the device's memory has taught us. Used by `queue.py`, told by `batcher.py`.
Knows costs and times, both of the caller's choice; nothing of devices.

The limit falls to half of what was too much, and doubles again after a while, since a shortage may have been another
program's. Each rise that was in vain makes the next one wait twice as long, so that a limit that is there to stay costs
little. One limit for all groups: they share the device's memory, and what one has learned spares the others the
failure.
"""

from __future__ import annotations

FIRST_WAIT_SECONDS = 60.0
LONGEST_WAIT_SECONDS = 3600.0


class MemoryLimit:
    """The largest cost of a batch that is worth a try.

    Args:
        max_batch_cost: where it begins, and what it never exceeds.
    """

    def __init__(self, max_batch_cost: int) -> None:
        self._max_batch_cost = max_batch_cost
        self._limit = max_batch_cost
        self._wait_seconds = FIRST_WAIT_SECONDS
        self._settled_at = 0.0  # when the present limit is old enough to be raised, or to be trusted
        self._is_on_trial = False

    def at(self, now: float) -> int:
        """The limit at this time, at least 1."""
        if self._limit < self._max_batch_cost and now >= self._settled_at:
            self._limit = min(2 * self._limit, self._max_batch_cost)
            self._settled_at = now + self._wait_seconds
            self._is_on_trial = True
        return self._limit

    def lower(self, failed_cost: int, now: float) -> None:
        """A batch of several entries and of this total cost was too much at this time."""
        if self._is_on_trial and now < self._settled_at:
            self._wait_seconds = min(2 * self._wait_seconds, LONGEST_WAIT_SECONDS)
        elif self._limit == self._max_batch_cost:
            self._wait_seconds = FIRST_WAIT_SECONDS
        self._is_on_trial = False
        self._limit = max(1, min(self._limit, failed_cost // 2))
        self._settled_at = now + self._wait_seconds
