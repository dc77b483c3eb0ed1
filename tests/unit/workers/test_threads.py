"""Threads that are watched: how long one has been busy is known, and one that is stuck does not hold up the others."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from service.workers.threads import WatchedThreads


@pytest.fixture
def threads() -> Iterator[WatchedThreads]:
    threads = WatchedThreads(1, "test")
    yield threads
    threads.shutdown()


def test_results_and_errors_come_back_in_order(threads: WatchedThreads) -> None:
    calls = [threads.submit(divmod, 7, divisor) for divisor in (2, 0, 3)]
    assert calls[0].result() == (3, 1)
    with pytest.raises(ZeroDivisionError):
        calls[1].result()
    assert calls[2].result() == (2, 1)


def test_one_call_runs_at_a_time(threads: WatchedThreads) -> None:
    may_end, began = threading.Event(), threading.Event()
    first, second = threads.submit(may_end.wait), threads.submit(began.set)
    assert threads.busy_since is not None
    assert not began.wait(0.05)
    may_end.set()
    assert first.result()
    second.result()


async def test_call_that_nobody_waits_for_lets_the_next_one_begin(threads: WatchedThreads) -> None:
    may_end, has_begun = threading.Event(), threading.Event()

    def hang() -> None:
        has_begun.set()
        may_end.wait()

    stuck = asyncio.get_running_loop().run_in_executor(threads, hang)
    await asyncio.to_thread(has_begun.wait)
    since = threads.busy_since
    stuck.cancel()
    assert await asyncio.get_running_loop().run_in_executor(threads, pow, 2, 3) == 8
    assert threads.busy_since == since  # the thread is still stuck, which counts as busy
    may_end.set()


def test_no_more_threads_stand_in_than_there_are(threads: WatchedThreads) -> None:
    may_end = threading.Event()
    for _ in range(2):
        stuck = threads.submit(may_end.wait)
        while not stuck.running():
            pass
        stuck.cancel()
    last = threads.submit(pow, 2, 3)
    assert threading.active_count() < 10
    assert not last.done()
    may_end.set()
    assert last.result() == 8


def test_background_threads_have_a_lower_priority() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    background = WatchedThreads(1, "background", niceness=10)
    assert background.submit(priority).result() == max(10, priority())
    background.shutdown()


def test_resting_does_nothing_to_other_threads(threads: WatchedThreads) -> None:
    with threads.resting():
        assert threads.busy_since is None
    assert threads.busy_since is None


def test_thread_that_rests_is_not_busy(threads: WatchedThreads) -> None:
    def rest() -> float | None:
        with threads.resting():
            return threads.busy_since

    assert threads.submit(rest).result() is None


def test_call_that_has_not_begun_is_cancelled_by_its_caller_or_by_the_shutdown(threads: WatchedThreads) -> None:
    may_end = threading.Event()
    running, unwanted, waiting = threads.submit(may_end.wait), threads.submit(pow, 2, 3), threads.submit(pow, 2, 3)
    assert unwanted.cancel()
    threads.shutdown(wait=False)
    with pytest.raises(CancelledError):
        waiting.result()
    may_end.set()
    assert running.result()
    with pytest.raises(RuntimeError, match="after the shutdown"):
        threads.submit(pow, 2, 3)
