"""Limits the cost of a batch to what has been found to fit the device's memory. Knows costs and times, both in the
caller's units; nothing of devices.

The limit falls to half the cost that failed and doubles again after a while, since another program may have caused the
shortage. Each rise that fails makes the next one wait twice as long, so that a permanent limit costs little. One limit
serves all groups: they share the device's memory, so a failure in one spares the others.
"""

from __future__ import annotations

FIRST_WAIT_SECONDS = 60.0
LONGEST_WAIT_SECONDS = 3600.0


class MemoryLimit:
    """The largest cost of a batch that is worth trying.

    Args:
        max_batch_cost: where the limit starts, and what it never exceeds.
    """

    def __init__(self, max_batch_cost: int) -> None:
        self._max_batch_cost = max_batch_cost
        self._limit = max_batch_cost
        self._wait_seconds = FIRST_WAIT_SECONDS
        self._settled_at = 0.0  # when the current limit is old enough to be raised, or to be trusted
        self._is_on_trial = False

    def at(self, now: float) -> int:
        """The limit at this time, at least 1."""
        if self._limit < self._max_batch_cost and now >= self._settled_at:
            self._limit = min(2 * self._limit, self._max_batch_cost)
            self._settled_at = now + self._wait_seconds
            self._is_on_trial = True
        return self._limit

    def lower(self, failed_cost: int, now: float) -> None:
        """Record that a batch of several entries and of this total cost ran out of memory at this time."""
        if self._is_on_trial and now < self._settled_at:
            self._wait_seconds = min(2 * self._wait_seconds, LONGEST_WAIT_SECONDS)
        elif self._limit == self._max_batch_cost:
            self._wait_seconds = FIRST_WAIT_SECONDS
        self._is_on_trial = False
        self._limit = max(1, min(self._limit, failed_cost // 2))
        self._settled_at = now + self._wait_seconds
