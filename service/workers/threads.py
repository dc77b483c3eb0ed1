"""`WatchedThreads`: an executor that knows how long each of its threads has been busy. Another thread stands in for one
whose call nobody waits for any more.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class WatchedThreads(Executor):
    """See the module.

    Args:
        count: calls that run at a time, those that nobody waits for any more left out. Of these as many may run beside
            them, so that a few calls that never end do not keep all others from running.
    """

    def __init__(self, count: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(2 * count, name)
        self._lock = threading.Lock()
        self._waiting: deque[_Call[Any]] = deque()
        self._free = count
        self._is_over = False
        self._began: dict[int, float] = {}

    @property
    def busy_since(self) -> float | None:
        """When the running call that is oldest began, or last rested, in seconds of `time.monotonic`."""
        return min(list(self._began.values()), default=None)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Entered in one of the threads, for as long as it waits for something: that is no sign of a hang."""
        thread = threading.get_ident()
        self._began.pop(thread)
        try:
            yield
        finally:
            self._began[thread] = time.monotonic()

    def submit(self, function: Callable[P, T], /, *args: P.args, **options: P.kwargs) -> Future[T]:
        """As in the base class. To cancel a call that runs does not end it, but lets the next one begin."""
        call = _Call(partial(function, *args, **options), self._release)
        with self._lock:
            if self._is_over:
                raise RuntimeError("cannot submit a call after the shutdown")
            self._waiting.append(call)
            self._start_waiting()
        return call

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As in the base class, but that calls which have not begun are cancelled in any case."""
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
        """Give the place of a call to the next one: it has ended, or nobody waits for it any more."""
        with self._lock:
            if call.holds_place:
                call.holds_place = False
                self._free += 1
                self._start_waiting()


class _Call(Future[T]):
    """One call and what comes of it."""

    def __init__(self, function: Callable[[], T], release: Callable[[_Call[T]], None]) -> None:
        super().__init__()
        self.function = function
        self.holds_place = False
        self._release = release

    def cancel(self) -> bool:
        """As in the base class, but for a call that runs: see `WatchedThreads.submit`."""
        if super().cancel():
            return True
        self._release(self)
        return False

    def cancel_with(self, run: Future[None]) -> None:
        """The executor was shut down before the call began."""
        if run.cancelled():
            self.cancel()
