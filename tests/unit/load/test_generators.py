"""When requests are sent: to servers that are a few lines, on an event loop whose clock jumps instead of waiting."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from service.load.client import NoAnswerError
from service.load.generators import Send, closed_loop, open_loop
from service.load.summary import Record, summarise


class _JumpingSelector(selectors.DefaultSelector):
    """Waits for nothing: notes how long it should have waited."""

    seconds = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.seconds += timeout or 0.0
        return super().select(0)


class _JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop on which sleeping takes no time, and its clock believes otherwise."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.seconds


def run(load: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=_JumpingLoop) as runner:
        runner.run(load)


def answers_after(seconds: float) -> Send:
    async def send() -> int:
        await asyncio.sleep(seconds)
        return 200

    return send


def test_closed_loop_keeps_so_many_under_way_and_waits_for_the_last() -> None:
    record = Record()
    run(closed_loop(answers_after(1.0), record, concurrency=3, seconds=9.5))
    assert len(record.samples) == 30
    summary = summarise(record.samples)
    assert summary.seconds == pytest.approx(10.0)
    assert summary.throughput_per_second == pytest.approx(3.0)
    assert summary.latency_ms["max"] == pytest.approx(1000)


def test_open_loop_sends_at_its_rate_however_slow_the_answers_are() -> None:
    quick, slow = Record(), Record()
    run(open_loop(answers_after(0.001), quick, rate=50, seconds=20, seed=3))
    run(open_loop(answers_after(60.0), slow, rate=50, seconds=20, seed=3))
    times = [sorted(sample.intended_at for sample in record.samples) for record in (quick, slow)]
    assert times[0] == pytest.approx(times[1])
    assert len(times[0]) == pytest.approx(1000, rel=0.1)
    gaps = [later - earlier for earlier, later in zip(times[0], times[0][1:], strict=False)]
    # Poisson: the gaps spread as much as they are long.
    assert sum(gap**2 for gap in gaps) / len(gaps) == pytest.approx(2 * (sum(gaps) / len(gaps)) ** 2, rel=0.2)


def test_answers_of_a_server_that_stalls_are_late_from_their_intended_start() -> None:
    """One connection, and its first answer takes 10 s: a closed loop sees one slow answer, an open loop all of them."""
    connection = asyncio.Lock()
    seconds = iter([10.0])

    async def stalls_once() -> int:
        async with connection:
            await asyncio.sleep(next(seconds, 0.0))
        return 200

    record = Record()
    run(open_loop(stalls_once, record, rate=10, seconds=10))
    late = [sample for sample in record.samples if sample.latency_seconds > 1.0]
    assert len(late) > 0.8 * len(record.samples)


@pytest.mark.parametrize("reason", ["refused", "timeout"])
def test_requests_without_an_answer_are_outcomes_and_end_nothing(reason: str) -> None:
    async def send() -> int:
        await asyncio.sleep(0.1)
        raise NoAnswerError(reason)

    record = Record()
    run(open_loop(send, record, rate=10, seconds=10))
    assert set(summarise(record.samples).outcomes) == {reason}
    assert record.in_flight == 0


@pytest.mark.parametrize(
    "begin",
    [
        lambda send, record: closed_loop(send, record, concurrency=4, seconds=99.0),
        lambda send, record: open_loop(send, record, rate=4.0, seconds=99.0),
    ],
)
def test_record_of_a_load_that_is_broken_off_holds_what_was_done(
    begin: Callable[[Send, Record], Awaitable[None]],
) -> None:
    record = Record()

    async def broken_off() -> None:
        async with asyncio.timeout(10.5):
            await begin(answers_after(1.0), record)

    with pytest.raises(TimeoutError):
        run(broken_off())
    assert len(record.samples) > 20
    assert record.in_flight == 0
