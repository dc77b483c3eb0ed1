"""The request queue: decides which entries are admitted and which make the next batch. A synchronous data structure for
one thread at a time. Time is passed in, so it can be tested with integers. Knows nothing of futures, threads, images or
models.

* There are two lines, one per priority. Each has its own bounds, so neither can shut the other out.
* An entry that would not be done before its deadline is refused at once instead of waiting in vain.
* A batch holds one group of one priority: the oldest entry of the line and its mates, the other entries of its group,
  in order of age. Since the oldest always goes, an entry with k older ones in its line is in one of the line's next k +
  1 batches: no entry starves.
* Mates of different shapes are padded to the largest of them, and a batch costs its padded size. A mate that would make
  the batch mostly padding waits for another batch.
* Interactive goes first, but while both wait, bulk gets `bulk_share` of the served cost, to within one batch.

Cost is in pixels, times are in seconds of the caller's clock.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from service.batching.backlog import SAFETY
from service.batching.memory_limit import MemoryLimit
from service.errors import NotReadyError, OverloadedError

T = TypeVar("T")

# The retry-after for a refused caller before the first batch is measured.
UNMEASURED_RETRY_AFTER_SECONDS = 1.0

# At most this share of a batch's cost is padding.
_MOST_PADDING = 0.5

# Weight of the old measurements after each new batch: about the last ten batches count.
_RATE_MEMORY = 0.9


class Priority(StrEnum):
    """Whether a caller is waiting for this answer, or the item is one of many that may take their time."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Entry(Generic[T]):
    """One item that waits. Two entries are never equal, even with equal items.

    Attributes:
        item: what `predict` gets.
        group: only entries of equal group share a batch.
        cost: at least 1, in pixels.
        shape: lengths whose product is the cost. All mates have the same number of lengths, and each length is padded
            to the largest among them. Empty if nothing is padded.
        enqueued_at: when it arrived.
        deadline: when its answer stops being useful; None for never.
        is_typical: whether the time it takes says anything about other entries of its cost.
        mates_until: until when a free device may wait for mates that are still on their way, if every member of the
            batch agrees. Entries of the other priority do not wait.
    """

    item: T
    group: Hashable
    cost: int
    shape: tuple[int, ...] = ()
    enqueued_at: float
    deadline: float | None = None
    priority: Priority = Priority.INTERACTIVE
    is_typical: bool = True
    mates_until: float = -math.inf

    def __post_init__(self) -> None:
        if self.cost < 1:
            raise ValueError(f"expected a cost of at least 1, got {self.cost}")
        if self.shape and math.prod(self.shape) != self.cost:
            raise ValueError(f"expected the cost of the shape {self.shape}, got {self.cost}")

    def is_expired(self, now: float) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and self.deadline <= now


def batch_cost(batch: Sequence[Entry[T]]) -> int:
    """The cost of entries that share a batch: each padded to the largest of them."""
    if not batch or not batch[0].shape:
        return sum(entry.cost for entry in batch)
    padded: int = math.prod(max(lengths) for lengths in zip(*(entry.shape for entry in batch), strict=True))
    return len(batch) * padded


class RequestQueue(Generic[T]):
    """Bounded waiting lines from which batches are taken.

    Args:
        max_batch_size: items in a batch.
        max_batch_cost: total cost of a batch; an entry that costs more goes alone. `lower_batch_cost` reduces it.
        max_queue_size: entries that may wait in each priority's line.
        max_queue_cost: total cost that may wait in each priority's line; an entry that costs more is admitted to an
            empty line, since it could never be served otherwise.
        max_batch_wait_seconds: how long the oldest entry of a group may be held back for more mates; 0 for never.
        bulk_share: share of the served cost that bulk is guaranteed while interactive entries wait too, 0 to 1
            exclusive.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_batch_cost: int,
        max_queue_size: int,
        max_queue_cost: int,
        max_batch_wait_seconds: float = 0.0,
        bulk_share: float = 0.2,
    ) -> None:
        if min(max_batch_size, max_batch_cost, max_queue_size, max_queue_cost) < 1:
            raise ValueError("expected batch and queue bounds of at least 1")
        if not 0 < bulk_share < 1:
            raise ValueError(f"expected a bulk_share between 0 and 1, got {bulk_share}")
        self._max_batch_size = max_batch_size
        self._memory_limit = MemoryLimit(max_batch_cost)
        self._max_queue_size = max_queue_size
        self._max_queue_cost = max_queue_cost
        self._max_batch_wait_seconds = max_batch_wait_seconds
        self._bulk_per_interactive = bulk_share / (1 - bulk_share)
        self._interactive: _Line[T] = _Line()
        self._bulk: _Line[T] = _Line()
        self._cost_owed_to_bulk = 0.0
        self._last_batch_cost = 0
        self._measured_cost = 0.0
        self._measured_seconds = 0.0
        self._busy_until = -math.inf
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._interactive) + len(self._bulk)

    @property
    def cost(self) -> int:
        """Total cost of all waiting entries, in pixels."""
        return self._interactive.cost + self._bulk.cost

    @property
    def is_closed(self) -> bool:
        """Whether new entries are refused for good."""
        return self._is_closed

    @property
    def held_until(self) -> float | None:
        """When the oldest entry stops being held back, whatever joins it; None for an empty queue."""
        oldest = self._next_line().oldest
        return None if oldest is None else max(oldest.enqueued_at + self._max_batch_wait_seconds, oldest.mates_until)

    def admit(self, entry: Entry[T]) -> None:
        """Let an entry wait.

        Raises:
            OverloadedError: its line is full, or too long for the entry's deadline; says when a retry may succeed.
            NotReadyError: the queue is closed.
        """
        if self._is_closed:
            raise NotReadyError("the service is stopping and takes no new requests")
        line = self._line(entry.priority)
        if len(line) >= self._max_queue_size:
            raise self._overloaded(f"{len(line)} images wait, at most {self._max_queue_size}")
        if len(line) > 0 and line.cost + entry.cost > self._max_queue_cost:
            total = line.cost + entry.cost
            raise self._overloaded(f"images of {total} pixels would wait, at most {self._max_queue_cost}")
        self._require_time(line, entry)
        line.add(entry)

    def remove(self, entry: Entry[T]) -> bool:
        """Drop an entry; returns whether it was still waiting."""
        return self._line(entry.priority).remove(entry)

    def expire(self, now: float) -> list[Entry[T]]:
        """Drop and return the entries whose deadline has passed."""
        expired = [entry for line in (self._interactive, self._bulk) for entry in line if entry.is_expired(now)]
        for entry in expired:
            self.remove(entry)
        return expired

    def take(self, now: float) -> list[Entry[T]]:
        """Remove and return the next batch; call it when the device is free, after `expire`.

        Returns:
            Entries of one group and one priority, oldest first, led by the oldest of that priority. Empty when nothing
            waits, or when the batch is held back for more mates until `held_until`.
        """
        line = self._next_line()
        batch = self._next_batch(line, now)
        if not batch and line is self._bulk:
            line = self._interactive
            batch = self._next_batch(line, now)
        for entry in batch:
            line.remove(entry)
        cost = sum(entry.cost for entry in batch)
        self._share_out(line, cost)
        is_known = bool(batch) and self._measured_cost > 0
        # The device is free when this is called, however long its last batch was expected to take.
        self._busy_until = now + self._seconds_for(cost) if is_known else -math.inf
        return batch

    def measure(self, cost: int, seconds: float) -> None:
        """Record that a batch of this total cost kept the device busy for so many seconds."""
        self._measured_cost = _RATE_MEMORY * self._measured_cost + cost
        self._measured_seconds = _RATE_MEMORY * self._measured_seconds + seconds

    def max_batch_cost(self, now: float) -> int:
        """The largest total cost of a batch that is worth trying at this time."""
        return self._memory_limit.at(now)

    def lower_batch_cost(self, failed_cost: int, now: float) -> None:
        """Record that a batch of several entries and of this total cost ran out of memory."""
        self._memory_limit.lower(failed_cost, now)

    def close(self) -> None:
        """Refuse new entries from now on, and hold nothing back: no more mates will come."""
        self._is_closed = True

    def _line(self, priority: Priority) -> _Line[T]:
        return self._bulk if priority == Priority.BULK else self._interactive

    def _next_line(self) -> _Line[T]:
        bulk_is_due = len(self._interactive) == 0 or self._cost_owed_to_bulk > 0
        return self._bulk if len(self._bulk) > 0 and bulk_is_due else self._interactive

    def _next_batch(self, line: _Line[T], now: float) -> list[Entry[T]]:
        """The next batch of a line; empty if it is held back."""
        batch, is_full = self._fill_batch(line, self.max_batch_cost(now))
        return [] if not is_full and self._may_be_held(batch, now) else batch

    def _fill_batch(self, line: _Line[T], max_batch_cost: int) -> tuple[list[Entry[T]], bool]:
        """The oldest entry and its mates, and whether no more could join. Stops at the first mate that does not fit, so
        that within a group only entries that would need too much padding are overtaken. Scans the whole line, which
        takes microseconds, little compared with a prediction.
        """
        batch: list[Entry[T]] = []
        for entry in line:
            if batch and entry.group != batch[0].group:
                continue
            grown = [*batch, entry]
            cost = batch_cost(grown)
            if sum(one.cost for one in grown) < (1 - _MOST_PADDING) * cost:
                continue
            if batch and cost > max_batch_cost:
                return batch, True
            batch = grown
            if len(batch) == self._max_batch_size or cost >= max_batch_cost:
                return batch, True
        return batch, False

    def _may_be_held(self, batch: Sequence[Entry[T]], now: float) -> bool:
        if self._is_closed or not batch:
            return False
        held_until = max(batch[0].enqueued_at + self._max_batch_wait_seconds, min(entry.mates_until for entry in batch))
        # A batch is not held back if one of its members would expire while the device sits idle.
        return now < held_until and not any(entry.is_expired(held_until) for entry in batch)

    def _share_out(self, line: _Line[T], cost: int) -> None:
        """Update how much cost bulk is owed. Interactive work always pays off bulk's debt, but gives bulk credit only
        while bulk waits: a share that bulk did not use is not saved up.
        """
        if line is self._interactive:
            self._cost_owed_to_bulk += cost * self._bulk_per_interactive
            if len(self._bulk) == 0:
                self._cost_owed_to_bulk = min(self._cost_owed_to_bulk, 0.0)
        elif len(self._interactive) > 0:
            self._cost_owed_to_bulk -= cost
        self._last_batch_cost = cost

    def _require_time(self, line: _Line[T], entry: Entry[T]) -> None:
        """Refuse an entry that would not be done before its deadline, at the measured rate and with some reserve."""
        if entry.deadline is None or self._measured_cost == 0:
            return
        running_seconds = max(0.0, self._busy_until - entry.enqueued_at)
        if len(self) == 0 and running_seconds == 0:
            return  # it waits for nothing else
        ahead = line.cost + entry.cost
        # What the other line may take meanwhile: its share, but no more than what waits there now.
        others = (
            min(self._interactive.cost, ahead / self._bulk_per_interactive)
            if line is self._bulk
            else min(self._bulk.cost, ahead * self._bulk_per_interactive)
        )
        seconds = running_seconds + self._seconds_for(ahead + others)
        seconds_left = entry.deadline - entry.enqueued_at
        if seconds > SAFETY * seconds_left:
            raise OverloadedError(
                f"with {len(self)} images waiting it would take {seconds:.1f} s, more than {SAFETY:.0%} of the "
                f"{seconds_left:.1f} s until the deadline",
                retry_after_seconds=seconds - SAFETY * max(seconds_left, 0.0),
            )

    def _seconds_for(self, cost: float) -> float:
        """How long the device needs at the measured rate."""
        return cost * self._measured_seconds / self._measured_cost

    def _overloaded(self, reason: str) -> OverloadedError:
        return OverloadedError(f"the queue is full: {reason}", retry_after_seconds=self._seconds_until_done())

    def _seconds_until_done(self) -> float:
        if self._measured_cost == 0:
            return UNMEASURED_RETRY_AFTER_SECONDS
        # A full queue means a busy device, so the batch taken last is still on it.
        return self._seconds_for(self.cost + self._last_batch_cost)


class _Line(Generic[T]):
    """The entries of one priority, oldest first, and their total cost."""

    def __init__(self) -> None:
        self._entries: dict[Entry[T], None] = {}  # a set that keeps the order of arrival
        self.cost = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(self._entries)

    @property
    def oldest(self) -> Entry[T] | None:
        return next(iter(self), None)

    def add(self, entry: Entry[T]) -> None:
        self._entries[entry] = None
        self.cost += entry.cost

    def remove(self, entry: Entry[T]) -> bool:
        if entry not in self._entries:
            return False
        del self._entries[entry]
        self.cost -= entry.cost
        return True
