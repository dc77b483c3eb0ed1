"""`Progress`: where a request is on its way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Progress:
    """Which stage a request is in, and how long each earlier stage took. The rooms advance it; logs, metrics and
    answers read it.

    Attributes:
        batch_id: identifies the last batch that contained the image.
        stage: the current stage.
        stage_seconds: time in seconds by stage, for the stages that it has left.
        started_at: when it entered its first stage, in seconds of `time.monotonic`.
        trace_id: of the trace that it belongs to; None if it belongs to none.
    """

    def __init__(self, stage: str, *, trace_id: str | None = None) -> None:
        self.stage = stage
        self.trace_id = trace_id
        self.stage_seconds: dict[str, float] = {}
        self.batch_id = ""
        self.started_at = self._entered_at = time.monotonic()

    def enter(self, stage: str) -> None:
        """Leave the current stage for another one."""
        now = time.monotonic()
        self.stage_seconds[self.stage] = self.stage_seconds.get(self.stage, 0.0) + now - self._entered_at
        self.stage, self._entered_at = stage, now

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Enter within `at_risk`, while the thread only waits."""
        self._mark(None, -1)
        try:
            yield
        finally:
            self._mark(None, 1, at_once=True)

    def queued(self, padded_pixels: int) -> None:
        """The image now waits for the device, with so many resized and padded pixels."""

    def _mark(self, stage: str | None, change: int, *, at_once: bool = False) -> None:
        """One more thread, or one fewer, works on the request. Only worker processes report it.

        Args:
            at_once: whether this and all earlier marks must be known before the work begins.
        """


@contextmanager
def at_risk(requests: Sequence[Progress], stage: str) -> Iterator[None]:
    """Enter while this thread does work on requests that might kill the process.

    Enter it before the work looks at the first byte, so that a worker that dies has already reported the work. Several
    threads may work on one request.

    Args:
        stage: `decode`, `inference` or `encode`.
    """
    for progress in requests:
        progress._mark(stage, 1, at_once=progress is requests[-1])
    try:
        yield
    finally:
        for progress in requests:
            progress._mark(stage, -1)
