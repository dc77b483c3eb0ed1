"""`WatchedThreads`: an executor that knows how long each of its threads has been busy. When a running call is
cancelled, a spare thread takes the place of the one that is stuck in it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class WatchedThreads(Executor):
    """See the module.

    Args:
        count: calls that run at a time, not counting those that were cancelled while running. As many of the latter may
            run beside them, so that a few calls that never end do not block all others.
        niceness: their least niceness, 0 to 19; see nice(1). 0 is the priority that most processes have.
    """

    def __init__(self, count: int, name: str, *, niceness: int = 0) -> None:
        self._threads = ThreadPoolExecutor(2 * count, name, initializer=_lower_priority, initargs=(niceness,))
        self._lock = threading.Lock()
        self._waiting: deque[_Call[Any]] = deque()
        self._free = count
        self._is_over = False
        self._began: dict[int, float] = {}

    @property
    def busy_since(self) -> float | None:
        """When the oldest running call began, or last stopped resting, in seconds of `time.monotonic`."""
        return min(list(self._began.values()), default=None)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Enter in one of the threads while it only waits for something, so that it is not taken for a hang. Does
        nothing in other threads.
        """
        thread = threading.get_ident()
        is_ours = self._began.pop(thread, None) is not None
        try:
            yield
        finally:
            if is_ours:
                self._began[thread] = time.monotonic()

    def submit(self, function: Callable[P, T], /, *args: P.args, **options: P.kwargs) -> Future[T]:
        """As in the base class. Cancelling a running call does not end it, but lets the next one begin."""
        call = _Call(partial(function, *args, **options), self._release)
        with self._lock:
            if self._is_over:
                raise RuntimeError("cannot submit a call after the shutdown")
            self._waiting.append(call)
            self._start_waiting()
        return call

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As in the base class, except that calls that have not begun are always cancelled."""
        with self._lock:
            self._is_over = True
        for call in self._waiting:
            call.cancel()
        self._threads.shutdown(wait, cancel_futures=True)

    def _start_waiting(self) -> None:
        while self._free > 0 and self._waiting and not self._is_over:
            call = self._waiting.popleft()
            self._free -= 1
            call.holds_place = True
            self._threads.submit(self._run, call).add_done_callback(call.cancel_with)

    def _run(self, call: _Call[Any]) -> None:
        thread = threading.get_ident()
        if call.set_running_or_notify_cancel():
            self._began[thread] = time.monotonic()
            try:
                result = call.function()
            except BaseException as error:
                call.set_exception(error)
            else:
                call.set_result(result)
            finally:
                del self._began[thread]
        self._release(call)

    def _release(self, call: _Call[Any]) -> None:
        """Give the place of a call to the next one: it has ended, or was cancelled while running."""
        with self._lock:
            if call.holds_place:
                call.holds_place = False
                self._free += 1
                self._start_waiting()


def _lower_priority(niceness: int) -> None:
    """Lower that of this thread alone, which Linux allows without privileges, as long as it is not raised again."""
    thread = threading.get_native_id()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))


class _Call(Future[T]):
    """One call and its result."""

    def __init__(self, function: Callable[[], T], release: Callable[[_Call[T]], None]) -> None:
        super().__init__()
        self.function = function
        self.holds_place = False
        self._release = release

    def cancel(self) -> bool:
        """As in the base class, except for a running call: see `WatchedThreads.submit`."""
        if super().cancel():
            return True
        self._release(self)
        return False

    def cancel_with(self, run: Future[None]) -> None:
        """Cancel this call if the executor was shut down before it began."""
        if run.cancelled():
            self.cancel()
