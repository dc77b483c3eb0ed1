"""The batcher: hands waiting items to `predict` in batches and each result back to who waits for it. Called by
`pipeline.py`, started and stopped by `app.py`. All runs on one event loop, except `predict`, which runs on one thread
of the batcher's own. Who goes next is decided in `queue.py`; this file knows futures and threads, no models.

The ledger `_outcomes` holds a future for every accepted entry that is not answered yet. An entry leaves it exactly
once: answered, expired, or abandoned by its caller; what `predict` returns for one that has left is dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from service.batching.queue import Entry, Priority, RequestQueue
from service.errors import DeadlineExceededError, InferenceError, NotReadyError, OverloadedError, ServiceError

T = TypeVar("T")
R = TypeVar("R")

_DRAIN_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Answer(Generic[R]):
    """What `submit` returns.

    Attributes:
        result: what `predict` returned for the item.
        queue_seconds: from `submit` until the `predict` call that gave the result.
        inference_seconds: duration of that call.
        batch_size: items in that call.
    """

    result: R
    queue_seconds: float
    inference_seconds: float
    batch_size: int


class BatchObserver(Protocol):
    """Is told what happens, on the event loop, so that it can be counted. Its methods are quick and do not raise.

    A subclass writes only what it wants to know. A stage is `queue` or `inference`.
    """

    def queue_changed(self, size: int, cost: int) -> None:
        """So many entries of this total cost (pixels) wait now."""
        return

    def batch_started(self, queue_seconds: Sequence[float]) -> None:
        """A batch goes to the device; for each of its members, how long it waited."""
        return

    def batch_failed(self, size: int, error: InferenceError) -> None:
        """`predict` failed; if size > 1, each member is now tried alone."""
        return

    def cancelled(self, stage: str) -> None:
        """A caller went away while its entry was in this stage."""
        return

    def expired(self, stage: str) -> None:
        """A deadline passed while its entry was in this stage."""
        return

    def rejected(self, reason: str) -> None:
        """An item was refused: `overloaded` or `not_ready`, the `code` of the error raised."""
        return


class _SilentObserver(BatchObserver):
    """Nobody wants to know."""


class Batcher(Generic[T, R]):
    """Batches items that are submitted one at a time.

    Work-conserving: when the device is free, the oldest entry's group goes at once (or after `max_batch_wait_seconds`);
    while it is busy, groups fill. If `predict` fails on a batch, its members are tried again, each alone, so that only
    the item to blame fails.

    Args:
        predict: from n items of one group to n results, in order. Called on the batcher's thread, one call at a time.
        max_batch_size, max_batch_cost, max_queue_size, max_queue_cost, max_batch_wait_seconds, bulk_share:
            see `RequestQueue`.
        observer: is told what happens.
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
        bulk_share: float = 0.2,
        observer: BatchObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._predict = predict
        self._queue: RequestQueue[T] = RequestQueue(
            max_batch_size=max_batch_size,
            max_batch_cost=max_batch_cost,
            max_queue_size=max_queue_size,
            max_queue_cost=max_queue_cost,
            max_batch_wait_seconds=max_batch_wait_seconds,
            bulk_share=bulk_share,
        )
        self._observer = observer or _SilentObserver()
        self._clock = clock
        self._outcomes: dict[Entry[T], asyncio.Future[Answer[R] | ServiceError]] = {}
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batcher")
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to serve; call once."""
        self._serving = asyncio.create_task(self._serve())

    async def stop(self, drain_timeout_seconds: float = _DRAIN_TIMEOUT_SECONDS) -> None:
        """Refuse new items, finish what is queued, fail what is left after the timeout (NotReadyError), end the thread.

        A `predict` that is running when the time is up cannot be interrupted: its thread ends when it returns.
        """
        # 1. Refuse new work.
        self._queue.close()
        if self._serving is None:
            return
        # 2. Finish what is queued.
        self._wake.set()
        try:
            await asyncio.wait([self._serving], timeout=drain_timeout_seconds)
        finally:
            # 3. Fail the rest, also when nobody waits for this call any more: `_serve` does it on its way out.
            self._serving.cancel()
            # 4. End the thread.
            self._thread.shutdown(wait=False)
        with suppress(asyncio.CancelledError):
            await self._serving

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
        deadline: float | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> Answer[R]:
        """Wait for the item's result. Cancelling the waiting task drops the item before the device sees it, if it can.

        Args:
            item: what `predict` gets.
            group: only items of equal group share a batch.
            cost: at least 1, in pixels.
            deadline: when the answer is of no more use, in seconds of the clock.
            priority: which line to wait in.

        Raises:
            OverloadedError: the queue is full; nothing was done.
            NotReadyError: not started, stopping, or stopped before the item's turn came.
            DeadlineExceededError: the deadline passed in the queue, or while the device worked on the item.
            InferenceError: `predict` failed on this item alone.
        """
        now = self._clock()
        entry = Entry(item=item, group=group, cost=cost, enqueued_at=now, deadline=deadline, priority=priority)
        self._admit(entry)
        outcome: asyncio.Future[Answer[R] | ServiceError] = asyncio.get_running_loop().create_future()
        self._outcomes[entry] = outcome
        timeout = None if deadline is None else max(0.0, deadline - now)
        try:
            await asyncio.wait([outcome], timeout=timeout)
        except asyncio.CancelledError:
            self._outcomes.pop(entry, None)
            self._observer.cancelled(self._withdraw(entry))
            raise
        if not outcome.done():
            self._expire(entry, stage=self._withdraw(entry))
        answer = outcome.result()
        if isinstance(answer, ServiceError):
            raise answer
        return answer

    def _admit(self, entry: Entry[T]) -> None:
        try:
            if self._serving is None:
                raise NotReadyError("the service has not started yet")
            self._queue.admit(entry)
        except (OverloadedError, NotReadyError) as error:
            self._observer.rejected(error.code)
            raise
        self._report_queue()
        self._wake.set()

    async def _serve(self) -> None:
        """Keep the device busy until the queue is closed and empty."""
        try:
            while len(self._queue) > 0 or not self._queue.is_closed:
                if batch := self._next_batch():
                    await self._run(batch)
                else:
                    await self._wait_for_work()
        finally:
            # Also when this task was cancelled or is broken: nobody may be left waiting.
            self._queue.close()
            for entry in list(self._outcomes):
                self._queue.remove(entry)
                self._answer(entry, NotReadyError("the service stopped before this request was done"))
            self._report_queue()

    async def _wait_for_work(self) -> None:
        self._wake.clear()
        held_until = self._queue.held_until
        with suppress(TimeoutError):
            async with asyncio.timeout(None if held_until is None else held_until - self._clock()):
                await self._wake.wait()

    def _next_batch(self) -> list[Entry[T]]:
        now = self._clock()
        for entry in self._queue.expire(now):
            self._expire(entry, stage="queue")
        batch = self._queue.take(now)
        self._report_queue()
        if batch:
            self._observer.batch_started([now - entry.enqueued_at for entry in batch])
        return batch

    async def _run(self, batch: Sequence[Entry[T]]) -> None:
        """Answer every member of the batch: with its result, or with the error of `predict` on it alone."""
        started_at = self._clock()
        try:
            results, seconds = await self._predict_on_thread([entry.item for entry in batch])
        except InferenceError as error:
            self._observer.batch_failed(len(batch), error)
            if len(batch) > 1:
                await self._run_each_alone(batch)
            else:
                self._answer(batch[0], error)
            return
        self._queue.measure(sum(entry.cost for entry in batch), seconds)
        for entry, result in zip(batch, results, strict=True):
            self._answer(entry, Answer(result, started_at - entry.enqueued_at, seconds, len(batch)))

    async def _run_each_alone(self, batch: Sequence[Entry[T]]) -> None:
        for entry in batch:
            if entry in self._outcomes:
                await self._run([entry])

    async def _predict_on_thread(self, items: Sequence[T]) -> tuple[Sequence[R], float]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._timed_predict, items)

    def _timed_predict(self, items: Sequence[T]) -> tuple[Sequence[R], float]:
        started_at = self._clock()
        try:
            results = self._predict(items)
            if len(results) != len(items):
                raise ValueError(f"expected {len(items)} results, got {len(results)}")
        except BaseException as error:
            # Also SystemExit, which would end the event loop, and StopIteration, which no future can hold.
            raise InferenceError(f"the model failed on a batch of {len(items)}: {error!r}") from error
        return results, self._clock() - started_at

    def _withdraw(self, entry: Entry[T]) -> str:
        """Take the entry out of the queue, if it is still there; the stage it was in."""
        was_waiting = self._queue.remove(entry)
        self._report_queue()
        return "queue" if was_waiting else "inference"

    def _expire(self, entry: Entry[T], *, stage: str) -> None:
        self._observer.expired(stage)
        self._answer(entry, DeadlineExceededError(f"the deadline passed in the stage {stage!r}", stage=stage))

    def _answer(self, entry: Entry[T], outcome: Answer[R] | ServiceError) -> None:
        future = self._outcomes.pop(entry, None)
        if future is not None:
            future.set_result(outcome)

    def _report_queue(self) -> None:
        self._observer.queue_changed(len(self._queue), self._queue.cost)
