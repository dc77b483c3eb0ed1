"""The promises of `Batcher`, with a fake `predict` that works only when the test lets it."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching.batcher import Batcher
from service.batching.memory_limit import FIRST_WAIT_SECONDS
from service.batching.queue import Priority
from service.errors import (
    DeadlineExceededError,
    InferenceError,
    NotReadyError,
    OutOfMemoryError,
    OverloadedError,
)

POISON = 13  # no model survives 13, 113, 213, ...
LARGE = 17  # and no memory suffices for 17, 117, 217, ...
OVER = 0.0  # a deadline on the standing clock that has passed
SOON_SECONDS = 0.5  # a deadline on the real clock that passes while the device is kept busy


class Device:
    """From n integers to ten times each. Every call waits for a permit, unless the device is open."""

    def __init__(self, *, is_open: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[threading.Thread] = set()
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Queue[list[int]] = asyncio.Queue()
        self._permits = threading.Semaphore(1000 if is_open else 0)
        self._progress = threading.Condition()

    def predict(self, items: Sequence[int]) -> list[int]:
        with self._progress:
            self.batches.append(list(items))
            self._progress.notify_all()
        self.threads.add(threading.current_thread())
        self._loop.call_soon_threadsafe(self._started.put_nowait, list(items))
        assert self._permits.acquire(timeout=20), "the test never let this batch through"
        if any(item % 100 == POISON for item in items):
            raise ValueError("cannot digest this")
        if any(item % 100 == LARGE for item in items):
            raise OutOfMemoryError("too large")
        return [10 * item for item in items]

    async def started(self) -> list[int]:
        """Wait for the next batch to be on the device."""
        return await self._started.get()

    def has_seen(self, item: int) -> bool:
        """Wait, without the event loop, for an item to be on the device."""
        with self._progress:
            return self._progress.wait_for(lambda: [item] in self.batches, timeout=20)

    def let_through(self, batches: int = 1000) -> None:
        self._permits.release(batches)


class Clock:
    """Stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_batcher(
    predict: Callable[[Sequence[int]], Sequence[int]],
    *,
    max_batch_size: int = 4,
    max_queue_size: int = 100,
    max_batch_wait_seconds: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> Batcher[int, int]:
    return Batcher(
        predict,
        max_batch_size=max_batch_size,
        max_batch_cost=100,
        max_queue_size=max_queue_size,
        max_queue_cost=10_000,
        max_batch_wait_seconds=max_batch_wait_seconds,
        clock=clock,
    )


def submit(
    batcher: Batcher[int, int],
    item: int,
    *,
    group: str = "a",
    deadline: float | None = None,
    priority: Priority = Priority.INTERACTIVE,
) -> asyncio.Task[int]:
    return asyncio.create_task(batcher.submit(item, group=group, cost=1, deadline=deadline, priority=priority))


async def submit_to_busy_device(batcher: Batcher[int, int], device: Device, item: int) -> asyncio.Task[int]:
    task = submit(batcher, item)
    assert await device.started() == [item]
    return task


async def settle() -> None:
    """Let every task run that can, without letting time pass."""
    for _ in range(20):
        await asyncio.sleep(0)


async def outcomes(*tasks: asyncio.Task[int]) -> list[object]:
    """The result, or the type of the error, of each."""
    done = await asyncio.gather(*tasks, return_exceptions=True)
    return [answer if isinstance(answer, int) else type(answer) for answer in done]


class TestBatching:
    async def test_free_device_gets_the_first_item_at_once_and_groups_fill_while_it_is_busy(self) -> None:
        device = Device()
        async with make_batcher(device.predict) as batcher:
            first = await submit_to_busy_device(batcher, device, 1)
            rest = [submit(batcher, item, group=group) for item, group in [(2, "a"), (3, "b"), (4, "a")]]
            await settle()
            device.let_through()
            assert await outcomes(first, *rest) == [10, 20, 30, 40]
        assert device.batches == [[1], [2, 4], [3]]

    async def test_items_submitted_together_share_the_first_batch(self) -> None:
        device = Device(is_open=True)
        async with make_batcher(device.predict) as batcher:
            assert list(await asyncio.gather(submit(batcher, 1), submit(batcher, 2))) == [10, 20]
        assert device.batches == [[1, 2]]

    async def test_device_gets_batch_after_batch_while_the_event_loop_is_busy_with_other_things(self) -> None:
        device = Device()
        async with make_batcher(device.predict, max_batch_size=1, clock=(clock := Clock())) as batcher:
            first = await submit_to_busy_device(batcher, device, 1)
            gone, stale = submit(batcher, 2), submit(batcher, 3, deadline=1000)
            rest = [submit(batcher, item) for item in (4, 5, 6)]
            await settle()
            gone.cancel()
            await settle()
            # From here the loop does nothing until the device has seen all: a device that asked it would hang.
            clock.now = 1000
            device.let_through()
            assert device.has_seen(6)
            assert await outcomes(first, gone, stale, *rest) == [
                *(10, asyncio.CancelledError, DeadlineExceededError),
                *(40, 50, 60),
            ]
        assert device.batches == [[1], [4], [5], [6]]

    async def test_predict_runs_on_one_thread_that_is_not_the_event_loops_and_ends_with_stop(self) -> None:
        device = Device(is_open=True)
        async with make_batcher(device.predict, max_batch_size=1) as batcher:
            await asyncio.gather(*(submit(batcher, item) for item in range(5)))
        (thread,) = device.threads
        thread.join(timeout=20)
        assert thread is not threading.current_thread()
        assert not thread.is_alive()

    async def test_interactive_items_go_before_bulk(self) -> None:
        device = Device()
        async with make_batcher(device.predict) as batcher:
            await submit_to_busy_device(batcher, device, 1)
            bulk = submit(batcher, 2, priority=Priority.BULK)
            await settle()
            interactive = submit(batcher, 3)
            await settle()
            device.let_through()
            await outcomes(bulk, interactive)
        assert device.batches == [[1], [3], [2]]

    async def test_held_batch_goes_when_it_is_full(self) -> None:
        device = Device(is_open=True)
        async with make_batcher(device.predict, max_batch_size=2, max_batch_wait_seconds=1000) as batcher:
            first = submit(batcher, 1)
            await settle()
            assert await outcomes(first, submit(batcher, 2)) == [10, 20]
        assert device.batches == [[1, 2]]

    async def test_held_batch_goes_when_its_time_is_over(self) -> None:
        device = Device(is_open=True)
        async with make_batcher(device.predict, max_batch_wait_seconds=SOON_SECONDS) as batcher:
            began = time.monotonic()
            assert await batcher.submit(1, group="a", cost=1) == 10
        assert time.monotonic() - began >= SOON_SECONDS


class TestRefusals:
    async def test_full_queue_refuses_at_once_and_what_was_accepted_is_answered(self) -> None:
        device = Device()
        async with make_batcher(device.predict, max_queue_size=1) as batcher:
            running = await submit_to_busy_device(batcher, device, 1)
            waiting, refused = submit(batcher, 2), submit(batcher, 3)
            assert await outcomes(refused) == [OverloadedError]
            assert len(batcher._queue) == 1
            device.let_through()
            assert await outcomes(running, waiting) == [10, 20]
        assert len(batcher._queue) == 0

    async def test_retry_after_is_computed_from_measured_batches(self) -> None:
        """One batch of cost 1 took 2 seconds; one runs and one waits when the third is refused."""
        device, clock = Device(), Clock()
        async with make_batcher(device.predict, max_queue_size=1, clock=clock) as batcher:
            await submit_to_busy_device(batcher, device, 1)
            clock.now = 2
            device.let_through(1)
            await submit_to_busy_device(batcher, device, 2)
            submit(batcher, 3)
            with pytest.raises(OverloadedError) as refusal:
                await submit(batcher, 4)
            device.let_through()
        assert refusal.value.retry_after_seconds == pytest.approx(4)

    async def test_nothing_is_accepted_before_start_or_after_stop(self) -> None:
        batcher = make_batcher(Device().predict)
        with pytest.raises(NotReadyError, match="not started"):
            await batcher.submit(1, group="a", cost=1)
        await batcher.start()
        await batcher.stop()
        with pytest.raises(NotReadyError, match="stopping"):
            await batcher.submit(1, group="a", cost=1)


class TestDeadlines:
    async def test_deadline_in_the_queue_is_answered_while_the_device_is_busy(self) -> None:
        device = Device()
        async with make_batcher(device.predict) as batcher:
            running = await submit_to_busy_device(batcher, device, 1)
            with pytest.raises(DeadlineExceededError) as error:
                await submit(batcher, 2, deadline=time.monotonic() + SOON_SECONDS)
            assert error.value.stage == "queue"
            assert len(batcher._queue) == 0
            device.let_through()
            assert await outcomes(running) == [10]
        assert device.batches == [[1]]

    async def test_deadline_on_the_device_is_answered_and_mates_are_unharmed(self) -> None:
        device = Device()
        async with make_batcher(device.predict, clock=Clock()) as batcher:
            hurried, patient = submit(batcher, 1, deadline=SOON_SECONDS), submit(batcher, 2)
            assert await device.started() == [1, 2]
            with pytest.raises(DeadlineExceededError) as error:
                await hurried
            assert error.value.stage == "inference"
            device.let_through()
            assert await outcomes(patient) == [20]

    async def test_expired_entry_is_dropped_when_the_device_becomes_free(self) -> None:
        """The clock says that it is over before any timer does: a late event loop hands the device no stale work."""
        device, clock = Device(), Clock()
        async with make_batcher(device.predict, clock=clock) as batcher:
            running = await submit_to_busy_device(batcher, device, 1)
            stale, fresh = submit(batcher, 2, deadline=1000), submit(batcher, 3)
            await settle()
            clock.now = 1000
            device.let_through()
            assert await outcomes(running, stale, fresh) == [10, DeadlineExceededError, 30]
        assert device.batches == [[1], [3]]


class TestCancellation:
    async def test_item_whose_caller_has_gone_never_reaches_the_device(self) -> None:
        device = Device()
        async with make_batcher(device.predict) as batcher:
            running = await submit_to_busy_device(batcher, device, 1)
            gone, staying = submit(batcher, 2), submit(batcher, 3)
            await settle()
            gone.cancel()
            await settle()
            device.let_through()
            assert await outcomes(running, gone, staying) == [10, asyncio.CancelledError, 30]
        assert device.batches == [[1], [3]]

    async def test_result_of_a_caller_who_left_during_inference_is_dropped(self) -> None:
        device = Device()
        async with make_batcher(device.predict) as batcher:
            gone, staying = submit(batcher, 1), submit(batcher, 2)
            assert await device.started() == [1, 2]
            gone.cancel()
            device.let_through()
            assert await outcomes(gone, staying) == [asyncio.CancelledError, 20]


class TestFailures:
    async def test_only_the_item_to_blame_fails_and_the_next_batch_works(self) -> None:
        device = Device(is_open=True)
        async with make_batcher(device.predict) as batcher:
            tasks = [submit(batcher, item) for item in (1, POISON, 3)]
            assert await outcomes(*tasks) == [10, InferenceError, 30]
            assert isinstance(tasks[1].exception(), InferenceError)
            assert await outcomes(submit(batcher, 4)) == [40]
        assert device.batches == [[1, POISON, 3], [1], [POISON, 3], [POISON], [3], [4]]

    async def test_inference_error_is_chained_from_its_cause(self) -> None:
        async with make_batcher(Device(is_open=True).predict) as batcher:
            with pytest.raises(InferenceError, match="cannot digest this") as error:
                await batcher.submit(POISON, group="a", cost=1)
        assert isinstance(error.value.__cause__, ValueError)

    async def test_wrong_number_of_results_is_an_inference_error(self) -> None:
        def lose_one(items: Sequence[int]) -> list[int]:
            return list(items)[1:]

        async with make_batcher(lose_one) as batcher:
            assert await outcomes(submit(batcher, 1), submit(batcher, 2)) == [InferenceError, InferenceError]

    @pytest.mark.parametrize("error", [StopIteration(), SystemExit(1), KeyboardInterrupt(), InferenceError("own")])
    async def test_whatever_predict_raises_fails_only_the_item(self, error: BaseException) -> None:
        def predict(items: Sequence[int]) -> list[int]:
            if POISON in items:
                raise error
            return list(items)

        async with make_batcher(predict) as batcher:
            assert await outcomes(submit(batcher, POISON), submit(batcher, 2)) == [InferenceError, 2]

    async def test_members_who_left_are_not_tried_again(self) -> None:
        device = Device()
        async with make_batcher(device.predict) as batcher:
            gone, poisoned, staying = (submit(batcher, item) for item in (1, POISON, 3))
            await device.started()
            gone.cancel()
            await settle()
            device.let_through()
            assert await outcomes(gone, poisoned, staying) == [asyncio.CancelledError, InferenceError, 30]
        assert device.batches == [[1, POISON, 3], [POISON, 3], [POISON], [3]]

    async def test_error_of_our_own_leaves_nobody_waiting(self) -> None:
        def clock() -> float:
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError("broken clock")
            return 0

        batcher = make_batcher(Device(is_open=True).predict, clock=clock)
        await batcher.start()
        assert await outcomes(submit(batcher, 1), submit(batcher, 2)) == [NotReadyError, NotReadyError]
        with pytest.raises(NotReadyError):
            await batcher.submit(3, group="a", cost=1)
        with pytest.raises(RuntimeError, match="broken clock"):
            await batcher.stop()


class Memory:
    """A device that can hold items up to a total; an item is its own cost."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.batches: list[list[int]] = []
        self.released: list[list[int]] = []

    def predict(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        if sum(items) > self.size:
            raise OutOfMemoryError(f"no memory for {len(items)} items")
        return [10 * item for item in items]

    def release(self, items: Sequence[int]) -> None:
        self.released.append(list(items))

    def batcher(self, *, clock: Callable[[], float]) -> Batcher[int, int]:
        return Batcher(
            self.predict,
            max_batch_size=8,
            max_batch_cost=64,
            max_queue_size=100,
            max_queue_cost=10_000,
            release_memory=self.release,
            clock=clock,
        )


async def submit_all(batcher: Batcher[int, int], costs: Sequence[int]) -> list[object]:
    tasks = [asyncio.create_task(batcher.submit(cost, group="a", cost=cost)) for cost in costs]
    return await outcomes(*tasks)


class TestMemory:
    async def test_batch_is_halved_until_it_fits_and_memory_is_released_before_each_try(self) -> None:
        memory = Memory(2)
        async with memory.batcher(clock=Clock()) as batcher:
            assert await submit_all(batcher, [1] * 8) == [10] * 8
        assert [len(batch) for batch in memory.batches] == [8, 4, 2, 2, 2, 2]
        assert [len(batch) for batch in memory.released] == [8, 4]

    async def test_limit_that_was_found_is_kept_and_tried_upward_after_a_while(self) -> None:
        memory, clock = Memory(4), Clock()
        async with memory.batcher(clock=clock) as batcher:
            await submit_all(batcher, [1] * 8)
            memory.batches.clear()
            await submit_all(batcher, [1] * 8)
            clock.now += FIRST_WAIT_SECONDS
            memory.size = 8
            await submit_all(batcher, [1] * 8)
        assert [len(batch) for batch in memory.batches] == [4, 4, 8]

    async def test_item_that_fails_alone_is_told_what_was_tried(self) -> None:
        memory = Memory(5)
        async with memory.batcher(clock=Clock()) as batcher:
            tasks = [asyncio.create_task(batcher.submit(cost, group="a", cost=cost)) for cost in (1, 1, 1, 6)]
            assert await outcomes(*tasks) == [10, 10, 10, OutOfMemoryError]
            assert str(tasks[3].exception()) == "no memory for 1 items; tried alone after batches of 4"
            with pytest.raises(OutOfMemoryError, match=r"^no memory for 1 items; tried alone$"):
                await batcher.submit(6, group="a", cost=6)
        assert memory.released[-1] == [6]

    async def test_memory_of_the_failed_batch_is_free_before_it_is_released(self) -> None:
        freed: list[bool] = []
        tensors: list[weakref.ref[Tensor]] = []

        class Tensor:
            pass

        def predict(items: Sequence[int]) -> list[int]:
            tensor = Tensor()
            tensors.append(weakref.ref(tensor))
            try:
                raise MemoryError
            except MemoryError as error:
                raise OutOfMemoryError("too much") from error

        batcher: Batcher[int, int] = Batcher(
            predict,
            max_batch_size=1,
            max_batch_cost=1,
            max_queue_size=1,
            max_queue_cost=1,
            release_memory=lambda items: freed.append(tensors[-1]() is None),
        )
        async with batcher:
            assert await outcomes(submit(batcher, 1)) == [OutOfMemoryError]
        assert freed == [True]


@settings(deadline=None)
@given(costs=st.lists(st.integers(1, 20), min_size=1, max_size=30), size=st.integers(0, 40))
def test_every_item_is_answered_whatever_the_memory_and_few_batches_are_tried_in_vain(
    costs: list[int], size: int
) -> None:
    memory = Memory(size)

    async def play() -> list[object]:
        async with memory.batcher(clock=Clock()) as batcher:
            return await submit_all(batcher, costs)

    assert asyncio.run(play()) == [10 * cost if cost <= size else OutOfMemoryError for cost in costs]
    in_vain = [batch for batch in memory.batches if len(batch) > 1 and sum(batch) > size]
    assert len(in_vain) <= 5  # each halves the limit, from 64 to 2 at the least, which is one batch of two
    assert len(memory.batches) <= len(costs) + len(in_vain)


class TestStop:
    async def test_stop_finishes_what_was_accepted_and_refuses_the_rest(self) -> None:
        device = Device()
        batcher = make_batcher(device.predict, max_batch_size=1)
        await batcher.start()
        accepted = [await submit_to_busy_device(batcher, device, 1), submit(batcher, 2), submit(batcher, 3)]
        await settle()
        stopping = asyncio.create_task(batcher.stop())
        await settle()
        late = submit(batcher, 4)
        assert await outcomes(late) == [NotReadyError]
        device.let_through()
        await stopping
        assert await outcomes(*accepted) == [10, 20, 30]

    async def test_stop_does_not_wait_for_mates(self) -> None:
        device = Device(is_open=True)
        batcher = make_batcher(device.predict, max_batch_wait_seconds=1000)
        await batcher.start()
        held = submit(batcher, 1)
        await settle()
        await batcher.stop()
        assert await outcomes(held) == [10]

    async def test_what_is_left_after_the_timeout_is_failed_and_the_thread_ends_with_its_batch(self) -> None:
        device = Device()
        batcher = make_batcher(device.predict, max_batch_size=1)
        await batcher.start()
        running, waiting = await submit_to_busy_device(batcher, device, 1), submit(batcher, 2)
        await settle()
        await batcher.stop(drain_timeout_seconds=0)
        assert await outcomes(running, waiting) == [NotReadyError, NotReadyError]
        assert len(batcher._queue) == 0
        device.let_through()
        (thread,) = device.threads
        thread.join(timeout=20)
        assert device.batches == [[1]] and not thread.is_alive()

    async def test_stop_that_is_itself_cancelled_still_fails_the_rest(self) -> None:
        device = Device()
        batcher = make_batcher(device.predict)
        await batcher.start()
        running = await submit_to_busy_device(batcher, device, 1)
        stopping = asyncio.create_task(batcher.stop())
        await settle()
        stopping.cancel()
        assert await outcomes(running) == [NotReadyError]
        device.let_through()

    async def test_stop_is_harmless_twice_and_before_start(self) -> None:
        batcher = make_batcher(Device().predict)
        await batcher.stop()
        async with make_batcher(Device().predict) as batcher:
            await batcher.stop()


@dataclass(frozen=True)
class Arrival:
    group: str
    priority: Priority
    deadline: float | None
    kind: int


ARRIVAL = st.builds(
    Arrival,
    group=st.sampled_from("ab"),
    priority=st.sampled_from(Priority),
    deadline=st.sampled_from([None, None, OVER, 1000.0]),
    kind=st.sampled_from([0, 0, 0, POISON, LARGE]),
)
CANCEL = st.integers(0, 9)  # the caller of the arrival of that number goes away
PERMIT = st.just("let one batch through")
STOP = st.just("begin to stop")


@settings(deadline=None, max_examples=200)
@given(steps=st.lists(st.one_of(ARRIVAL, ARRIVAL, CANCEL, PERMIT, STOP), max_size=25), drains=st.booleans())
def test_every_accepted_item_is_answered_whatever_happens(steps: list[Arrival | int | str], drains: bool) -> None:
    """Any order of arrivals, cancellations, deadlines, failures, batches and a stop; then the drain ends or is cut."""
    asyncio.run(play(steps, drains=drains))


async def play(steps: list[Arrival | int | str], *, drains: bool) -> None:
    errors: list[object] = []  # such as a second answer to one item
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    device = Device()
    batcher = make_batcher(device.predict, max_batch_size=3, max_queue_size=4, clock=Clock())
    await batcher.start()
    submitted: dict[int, tuple[Arrival, asyncio.Task[int]]] = {}
    cancelled: set[int] = set()
    late: set[int] = set()
    stopping: asyncio.Task[None] | None = None
    for step in steps:
        if isinstance(step, Arrival):
            item = 100 * len(submitted) + step.kind
            late |= set() if stopping is None else {item}
            task = submit(batcher, item, group=step.group, priority=step.priority, deadline=step.deadline)
            submitted[item] = step, task
        elif isinstance(step, int):
            for item, (_, task) in list(submitted.items())[step : step + 1]:
                cancelled |= {item} if task.cancel() else set()
        elif step == "begin to stop":
            stopping = stopping or asyncio.create_task(batcher.stop(drain_timeout_seconds=20))
        else:
            device.let_through(1)
        await settle()
    if drains:
        device.let_through()
    await batcher.stop(drain_timeout_seconds=20 if drains else 0)
    await settle()
    device.let_through()
    if stopping is not None:
        await stopping

    assert errors == []
    for item, (arrival, task) in submitted.items():
        assert task.done()
        (outcome,) = await outcomes(task)
        if item in cancelled:
            assert outcome is asyncio.CancelledError
        elif item in late:
            assert outcome is NotReadyError
        elif arrival.deadline == OVER:
            assert outcome in (DeadlineExceededError, OverloadedError)
        else:
            failure = {POISON: InferenceError, LARGE: OutOfMemoryError}
            result = failure.get(arrival.kind, 10 * item)
            assert outcome in ((result, OverloadedError) if drains else (result, OverloadedError, NotReadyError))
    for batch in device.batches:
        assert len({(submitted[item][0].group, submitted[item][0].priority) for item in batch}) == 1
        assert not any(submitted[item][0].deadline == OVER for item in batch)
