"""The batcher: hands waiting items to `predict` in batches and each result back to the caller that waits for it.
`queue.py` decides what goes next; this file knows futures and threads, no models.

Callers wait on the event loop; `predict` runs on the batcher's own thread, which takes its next batch itself. So the
device never waits for an event loop that is busy with other things, and an entry can be withdrawn until its batch
begins. `_condition` guards what both sides touch: the queue and the set of entries in `_outcomes`.

`_outcomes` holds a future for every accepted entry that is not answered yet. An entry leaves it exactly once, on the
event loop: answered, expired, or abandoned by its caller. Whatever `predict` returns for it after that is dropped.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

from service.batching.queue import Entry, Priority, RequestQueue, batch_cost
from service.errors import (
    DeadlineExceededError,
    InferenceError,
    NotReadyError,
    OutOfMemoryError,
    ServiceError,
)

T = TypeVar("T")
R = TypeVar("R")

_DRAIN_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class _Answer(Generic[R]):
    """What `predict` returned for an item."""

    result: R


class Batcher(Generic[T, R]):
    """Batches items that are submitted one at a time.

    Work-conserving: when the device is free, the oldest entry's group goes at once (or after `max_batch_wait_seconds`);
    while it is busy, groups fill. If `predict` fails on a batch, each half is retried, and so on, so that only the item
    to blame fails. If it failed for lack of memory, reserved memory is released first, and later batches are smaller
    for a while.

    Args:
        predict: from n items of one group to n results, in order. Called on the batcher's thread, one call at a time.
        max_batch_size, max_batch_cost, max_queue_size, max_queue_cost, max_batch_wait_seconds: see
            `RequestQueue`.
        release_memory: frees what the device holds in reserve. Called on the batcher's thread with the items for which
            `predict` raised OutOfMemoryError.
        clock: a monotonic time in seconds, also called on the batcher's thread.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[T]], Sequence[R]],
        *,
        max_batch_size: int,
        max_batch_cost: int,
        max_queue_size: int,
        max_queue_cost: int,
        max_batch_wait_seconds: float = 0.0,
        release_memory: Callable[[Sequence[T]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._predict = predict
        self._queue: RequestQueue[T] = RequestQueue(
            max_batch_size=max_batch_size,
            max_batch_cost=max_batch_cost,
            max_queue_size=max_queue_size,
            max_queue_cost=max_queue_cost,
            max_batch_wait_seconds=max_batch_wait_seconds,
        )
        self._release_memory = release_memory
        self._clock = clock
        self._outcomes: dict[Entry[T], asyncio.Future[_Answer[R] | ServiceError]] = {}
        self._condition = threading.Condition()
        self._is_woken = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Begin to serve; call once."""
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        # A daemon: a device that hangs must not keep the process from ending.
        threading.Thread(target=self._serve, name="batcher", daemon=True).start()

    async def stop(self, drain_timeout_seconds: float = _DRAIN_TIMEOUT_SECONDS) -> None:
        """Refuse new items, finish what is queued, fail what is left after the timeout (NotReadyError), end the thread.

        A `predict` that is still running at the timeout cannot be interrupted: the thread ends when it returns.
        """
        # 1. Refuse new work.
        with self._condition:
            self._queue.close()
        if self._ended is None:
            return
        # 2. Finish what is queued; the thread ends when the queue is empty.
        self._wake()
        try:
            await asyncio.wait([self._ended], timeout=drain_timeout_seconds)
        finally:
            # 3. Fail the rest, even if this call is cancelled.
            self._give_up()
        if self._ended.done():
            self._ended.result()

    @property
    def has_failed(self) -> bool:
        """Whether the thread has ended because of a bug of ours, so that nothing is answered any more."""
        return self._ended is not None and self._ended.done() and self._ended.exception() is not None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def submit(
        self,
        item: T,
        *,
        group: Hashable,
        cost: int,
        shape: tuple[int, ...] = (),
        deadline: float | None = None,
        priority: Priority = Priority.INTERACTIVE,
        mates_seconds: float = 0.0,
        is_typical: bool = True,
    ) -> R:
        """Wait for the item's result. Cancelling the waiting task drops the item, unless its batch has begun.

        Args:
            item: what `predict` gets.
            group: only items of equal group share a batch.
            cost: at least 1, in pixels.
            shape: see `Entry`.
            deadline: when the answer stops being useful, in seconds of the clock.
            priority: which line to wait in.
            is_typical: see `Entry`.
            mates_seconds: for how long a free device may wait for mates, see `Entry`.

        Raises:
            OverloadedError: the queue is full; nothing was done.
            NotReadyError: not started, stopping, or stopped before the item's turn came.
            DeadlineExceededError: the deadline passed in the queue, or while the device worked on the item.
            InferenceError: `predict` failed on this item alone; OutOfMemoryError if for lack of memory.
        """
        now = self._clock()
        entry = Entry(
            item=item,
            group=group,
            cost=cost,
            shape=shape,
            enqueued_at=now,
            deadline=deadline,
            priority=priority,
            is_typical=is_typical,
            mates_until=now + mates_seconds if mates_seconds > 0 else -math.inf,
        )
        outcome = self._admit(entry)
        timeout = None if deadline is None else max(0.0, deadline - now)
        try:
            await asyncio.wait([outcome], timeout=timeout)
        except asyncio.CancelledError:
            self._outcomes.pop(entry, None)
            self._withdraw(entry)
            raise
        if not outcome.done():
            self._expire(entry, stage=self._withdraw(entry))
        answer = outcome.result()
        if isinstance(answer, ServiceError):
            raise answer
        return answer.result

    def _admit(self, entry: Entry[T]) -> asyncio.Future[_Answer[R] | ServiceError]:
        if self._loop is None:
            raise NotReadyError("the service has not started yet")
        with self._condition:
            self._queue.admit(entry)
            outcome = self._outcomes[entry] = self._loop.create_future()
        # Not at once: items that are submitted together should share a batch even if the device is idle.
        self._loop.call_soon(self._wake)
        return outcome

    def _withdraw(self, entry: Entry[T]) -> str:
        """Take the entry out of the queue, if it is still there; returns the stage it was in."""
        with self._condition:
            was_waiting = self._queue.remove(entry)
        return "queue" if was_waiting else "inference"

    def _expire(self, entry: Entry[T], *, stage: str) -> None:
        self._answer(entry, DeadlineExceededError(f"the deadline passed in the stage {stage!r}", stage=stage))

    def _answer(self, entry: Entry[T], outcome: _Answer[R] | ServiceError) -> None:
        future = self._outcomes.pop(entry, None)
        if future is not None:
            future.set_result(outcome)

    def _answer_all(self, batch: Sequence[Entry[T]], outcomes: Sequence[_Answer[R] | ServiceError]) -> None:
        for entry, outcome in zip(batch, outcomes, strict=True):
            self._answer(entry, outcome)

    def _expire_all(self, expired: Sequence[Entry[T]]) -> None:
        for entry in expired:
            if entry in self._outcomes:
                self._expire(entry, stage="queue")

    def _give_up(self) -> None:
        """Fail every entry that is not answered yet; the result of a batch on the device will be dropped."""
        with self._condition:
            self._queue.close()
            for entry in self._outcomes:
                self._queue.remove(entry)
        for entry in list(self._outcomes):
            self._answer(entry, NotReadyError("the service stopped before this request was done"))
        self._wake()

    def _end(self, failure: BaseException | None) -> None:
        """The thread has ended; a failure means a bug of ours."""
        assert self._ended is not None
        self._give_up()
        if failure is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(failure)

    def _wake(self) -> None:
        """Let the thread look at the queue."""
        with self._condition:
            self._is_woken = True
            self._condition.notify()

    # From here on, everything runs on the batcher's thread.

    def _tell(self, told: Callable[..., None], *args: object) -> None:
        """Call a function on the event loop, after those that were passed here before."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: no caller waits any more
            self._loop.call_soon_threadsafe(told, *args)

    def _serve(self) -> None:
        """Keep the device busy until the queue is closed and empty."""
        failure: BaseException | None = None
        try:
            self._wait_for_work()
            while self._run_next():
                pass
        except BaseException as error:
            # No caller may be left waiting; `stop` raises this error.
            failure = error
        self._tell(self._end, failure)

    def _wait_for_work(self, timeout_seconds: float | None = None) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._is_woken, timeout_seconds)
            self._is_woken = False

    def _run_next(self) -> bool:
        """Wait for a batch and run it; return whether there was one. Keeps no batch while waiting for the next."""
        batch = self._next_batch()
        if batch:
            self._run(batch)
        return bool(batch)

    def _next_batch(self) -> list[Entry[T]]:
        """Wait for a batch; empty when there will be no more."""
        while True:
            with self._condition:
                now = self._clock()
                expired = self._queue.expire(now)
                batch = self._queue.take(now)
                is_over = self._queue.is_closed and len(self._queue) == 0
                held_until = self._queue.held_until
            if expired:
                self._tell(self._expire_all, expired)
            if batch or is_over:
                return batch
            self._wait_for_work(None if held_until is None else held_until - now)

    def _run(self, batch: Sequence[Entry[T]], *, failed_sizes: tuple[int, ...] = ()) -> None:
        """Answer every member of the batch: with its result, or with the error of `predict` on it alone.

        Args:
            failed_sizes: sizes of the earlier batches that contained these members and failed.
        """
        started_at = self._clock()
        with self._condition:
            batch = [entry for entry in batch if entry in self._outcomes]
            max_batch_cost = self._queue.max_batch_cost(started_at)
        cost = batch_cost(batch)
        if not batch:
            return
        if len(batch) > 1 and cost > max_batch_cost:
            self._run_halves(batch, failed_sizes)
            return
        try:
            results = self._predict_all([entry.item for entry in batch])
        except OutOfMemoryError as error:
            # A new error: the original's traceback keeps the batch's memory in use, so it could not be released.
            failure: InferenceError = OutOfMemoryError(str(error))
        except InferenceError as error:
            failure = error
        else:
            seconds = self._clock() - started_at
            if all(entry.is_typical for entry in batch):
                with self._condition:
                    self._queue.measure(sum(entry.cost for entry in batch), seconds)
            self._tell(self._answer_all, batch, [_Answer(one) for one in results])
            return
        if isinstance(failure, OutOfMemoryError):
            self._make_room(batch, cost)
        if len(batch) > 1:
            self._run_halves(batch, (*failed_sizes, len(batch)))
        else:
            self._tell(self._answer_all, batch, [_describe(failure, failed_sizes)])

    def _run_halves(self, batch: Sequence[Entry[T]], failed_sizes: tuple[int, ...]) -> None:
        middle = len(batch) // 2
        self._run(batch[:middle], failed_sizes=failed_sizes)
        self._run(batch[middle:], failed_sizes=failed_sizes)

    def _predict_all(self, items: Sequence[T]) -> Sequence[R]:
        try:
            results = self._predict(items)
            if len(results) != len(items):
                raise ValueError(f"expected {len(items)} results, got {len(results)}")
        except OutOfMemoryError:
            raise
        except BaseException as error:
            # Includes SystemExit, which would end the thread, and StopIteration, which no future can hold.
            raise InferenceError(f"the model failed on a batch of {len(items)}: {error!r}") from error
        return results

    def _make_room(self, batch: Sequence[Entry[T]], cost: int) -> None:
        """After a batch ran out of memory: release what can be released, and lower the limit for later batches."""
        if self._release_memory is not None:
            # If the device cannot even do that, the retry fails too, and its callers get that error.
            with suppress(Exception):
                self._release_memory([entry.item for entry in batch])
        if len(batch) > 1:
            with self._condition:
                self._queue.lower_batch_cost(cost, self._clock())


def _describe(failure: InferenceError, failed_sizes: Sequence[int]) -> InferenceError:
    """The failure of an item on its own; if for lack of memory, with the batch sizes that failed before."""
    if not isinstance(failure, OutOfMemoryError):
        return failure
    before = f" after batches of {', '.join(map(str, failed_sizes))}" if failed_sizes else ""
    return OutOfMemoryError(f"{failure}; tried alone{before}")
