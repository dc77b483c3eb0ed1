"""What each API key may ask for in a minute: images and pixels. A key that has used up its share gets a 429 that says
when to come back; others do not notice it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.errors import QuotaError
from service.settings import Settings


@dataclass(slots=True)
class Bucket:
    """A token bucket: full at first, filled again evenly, and for a moment it may owe.

    What something costs is often known only afterwards, such as the pixels of a picture. So anything may begin while
    the bucket holds at least 1, and what it took beyond that is waited for by the next.

    Attributes:
        per_minute: how much flows in, and the most that it holds, if that is above 1.
        level: how much it holds.
        at: when, in seconds of a steady clock.
    """

    per_minute: float
    level: float
    at: float

    def wait_seconds(self, now: float) -> float:
        """How long until something may begin; 0 if it may now."""
        self._fill(now)
        return max(0.0, 1 - self.level) * 60 / self.per_minute

    def take(self, amount: float, now: float) -> None:
        """Something took this much."""
        self._fill(now)
        self.level -= amount

    def _fill(self, now: float) -> None:
        self.level = min(max(1.0, self.per_minute), self.level + (now - self.at) * self.per_minute / 60)
        self.at = now


class Quotas:
    """The buckets of all keys, by fingerprint. There are as many as there are keys, for unknown ones never get here.

    Args:
        clock: seconds, steady.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        limits = {
            "images": settings.max_images_per_minute,
            "pixels": settings.max_pixels_per_minute,
        }
        self._limits = {unit: float(limit) for unit, limit in limits.items() if limit is not None}
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._clock = clock

    def require(self, caller: str | None) -> None:
        """Let a request of this key begin; None, a caller without one, may always.

        Raises:
            QuotaError: the key has used up its share.
        """
        for unit, limit in self._limits.items() if caller is not None else ():
            wait_seconds = self._bucket(str(caller), unit).wait_seconds(self._clock())
            if wait_seconds > 0:
                raise QuotaError(
                    f"this key has used up its {limit:g} {unit} a minute", retry_after_seconds=wait_seconds
                )

    def charge(self, caller: str | None, *, images: int = 0, pixels: int = 0) -> None:
        """Count what a request of this key took."""
        if caller is not None:
            for unit, amount in (("images", images), ("pixels", pixels)):
                if unit in self._limits:
                    self._bucket(caller, unit).take(amount, self._clock())

    def _bucket(self, caller: str, unit: str) -> Bucket:
        limit = self._limits[unit]
        return self._buckets.setdefault((caller, unit), Bucket(limit, max(1.0, limit), self._clock()))


def fingerprint(key: bytes) -> str:
    """Eight hexadecimal digits that name a key in the log without giving it away."""
    return hashlib.sha256(key).hexdigest()[:8]
