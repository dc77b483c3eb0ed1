"""One line on standard error that says how far a long run is."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_SECONDS_BETWEEN = 0.2
_BAR_WIDTH = 24


class ProgressLine:
    """Counts files, and writes a line over and over: a bar, numbers, and how long it will take.

    Args:
        total: how many files there are to do.
        stream: where it is written.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self._begin = time.monotonic()
        self._next = self._begin
        self._done = self._failed = self._width = 0

    def add(self, *, has_failed: bool) -> None:
        """Count a file that is done."""
        self._done += 1
        self._failed += has_failed
        if (now := time.monotonic()) >= self._next:
            self._next = now + _SECONDS_BETWEEN
            self._write(now)

    def finish(self) -> None:
        """Write the last line, and end it."""
        self._write(time.monotonic())
        self._stream.write("\n")
        self._stream.flush()

    def _write(self, now: float) -> None:
        rate = self._done / max(now - self._begin, 1e-3)
        filled = _BAR_WIDTH * self._done // max(self._total, 1)
        words = f"[{'#' * filled:.<{_BAR_WIDTH}}] {self._done}/{self._total}, {rate:.1f}/s"
        if self._done and self._done < self._total:
            seconds = round((self._total - self._done) / rate)
            words += f", {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        if self._failed:
            words += f", {self._failed} failed"
        self._stream.write(f"\r{words:<{self._width}}")
        self._stream.flush()
        self._width = len(words)
