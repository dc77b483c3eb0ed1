"""The bound on the pixels of all decoded images together: one `HeldPixels` per worker, one `PixelHolding` per job. The
decoding thread reserves room before it decodes, and waits if there is none; meanwhile it holds only the encoded image,
a few kilobytes. Knows numbers and threads only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from service.errors import CancelledRequestError


class HeldPixels:
    """The account of all jobs.

    Args:
        max_held_pixels: most pixels at a time; only an image that is alone may exceed it.
        resting: returns a context manager, entered while a thread waits for room.
    """

    def __init__(
        self, max_held_pixels: int, *, resting: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._max_held_pixels = max_held_pixels
        self._resting = resting
        self._changed = threading.Condition()
        # Only one thread at a time waits for room, so that many small images cannot keep a large one waiting forever.
        self._turn = threading.Lock()
        self.size = 0

    @contextmanager
    def hold(self, *, resting: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[PixelHolding]:
        """The account of one job, empty at first. What it holds is given back at the end.

        Args:
            resting: returns a context manager, entered while a thread of this job waits for room.
        """
        holding = PixelHolding(self, resting)
        try:
            yield holding
        finally:
            with self._changed:
                holding.is_over = True
                self.size -= holding.size
                self._changed.notify_all()

    def give(self, holding: PixelHolding, pixels: int) -> None:
        """See `PixelHolding.take`."""
        with self._changed:
            if not self._turn.locked() and self._may_give(holding, pixels):
                self._give(holding, pixels)
                return
        with self._resting(), holding.resting(), self._turn, self._changed:
            self._changed.wait_for(lambda: self._may_give(holding, pixels))
            self._give(holding, pixels)

    def _may_give(self, holding: PixelHolding, pixels: int) -> bool:
        return holding.is_over or self.size == 0 or self.size + pixels <= self._max_held_pixels

    def _give(self, holding: PixelHolding, pixels: int) -> None:
        if holding.is_over:
            raise CancelledRequestError("nobody waits for this image any more")
        holding.size += pixels
        self.size += pixels


class PixelHolding:
    """The account of one job; `HeldPixels.hold` opens it.

    Attributes:
        resting: see `HeldPixels.hold`.
        size: pixels that it holds.
        is_over: whether the job has ended.
    """

    def __init__(self, held_pixels: HeldPixels, resting: Callable[[], AbstractContextManager[None]]) -> None:
        self._held_pixels = held_pixels
        self.resting = resting
        self.size = 0
        self.is_over = False

    def take(self, pixels: int) -> None:
        """Block this thread until there is room for so many more pixels, then hold them.

        Raises:
            CancelledRequestError: the job ended meanwhile.
        """
        self._held_pixels.give(self, pixels)
