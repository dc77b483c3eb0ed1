"""The bound on the bytes of all requests together: one `HeldBytes` for the whole HTTP process, one `Holding` for each
request. The bytes of a body are added to the request's holding as they arrive. Knows numbers only; everything runs on
one thread.

Intended use: the outermost layer of a request opens its holding, `with held_bytes.hold() as holding`, and closes it
when the answer has been sent, so that whatever keeps the body in between (the queue, or a dispatcher that may have to
resend it to a worker) needs no accounting of its own. Only received bytes are charged, not the declared Content-Length,
so a client cannot reserve memory by announcing a large body.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import OverloadedError

# Assumed duration of a holding before the first one has ended.
_UNMEASURED_SECONDS = 1.0

# Weight of the old measurements after each new one: about the last fifty holdings count.
_TIME_MEMORY = 0.98


class HeldBytes:
    """The account of all requests.

    Args:
        max_held_bytes: most bytes at a time. Only a request that holds alone may exceed it, since so large a body could
            never be read otherwise.
        clock: a monotonic time in seconds.
    """

    def __init__(self, max_held_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        if max_held_bytes < 1:
            raise ValueError(f"expected max_held_bytes of at least 1, got {max_held_bytes}")
        self._max_held_bytes = max_held_bytes
        self._clock = clock
        self._seconds_per_holding = _UNMEASURED_SECONDS
        self.size = 0

    @contextmanager
    def hold(self) -> Iterator[Holding]:
        """The account of one request, empty at first; what it holds is given back at the end."""
        holding = Holding(self)
        started_at = self._clock()
        try:
            yield holding
        finally:
            self.size -= holding.size
            if holding.size > 0:
                seconds = self._clock() - started_at
                self._seconds_per_holding += (1 - _TIME_MEMORY) * (seconds - self._seconds_per_holding)

    def require_room(self, size: int, *, beside: int) -> None:
        """Raise OverloadedError if a request that holds `beside` bytes may not hold `size` more."""
        if self.size > beside and self.size + size > self._max_held_bytes:
            # Little's law: after about the duration of one holding, the bytes held now will have been released.
            raise OverloadedError(
                f"the requests under way would hold {self.size + size} bytes, at most {self._max_held_bytes}",
                retry_after_seconds=self._seconds_per_holding,
            )


class Holding:
    """The account of one request; `HeldBytes.hold` opens it.

    Attributes:
        size: bytes that it holds.
    """

    def __init__(self, held_bytes: HeldBytes) -> None:
        self._held_bytes = held_bytes
        self.size = 0

    def expect(self, size: int) -> None:
        """Check that there is room for so many more bytes; takes none.

        Raises:
            OverloadedError: they are too many for all requests together.
        """
        self._held_bytes.require_room(size, beside=self.size)

    def add(self, size: int) -> None:
        """Hold so many more bytes.

        Raises:
            OverloadedError: they are too many for all requests together; nothing was added.
        """
        self.expect(size)
        self.size += size
        self._held_bytes.size += size

    def release(self, size: int) -> None:
        """Give back so many bytes before the end."""
        self.size -= size
        self._held_bytes.size -= size
