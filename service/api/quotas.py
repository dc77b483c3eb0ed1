"""Limits what each API key may ask for per minute: images and pixels. A key that has used up its share gets a 429 that
says when to retry; other keys are not affected.
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
    """A token bucket: full at first, refilled at a constant rate, and temporarily allowed to go negative.

    A cost is often known only afterwards, such as the pixels of a picture. So a request may begin while the bucket
    holds at least 1; if it then takes more than there is, the next request waits for the difference.

    Attributes:
        per_minute: refill per minute, and also the capacity, which is at least 1.
        level: how much the bucket held at time `at`.
        at: time of `level`, in seconds of a monotonic clock.
    """

    per_minute: float
    level: float
    at: float

    def wait_seconds(self, now: float) -> float:
        """How long until a request may begin; 0 if it may begin now."""
        self._fill(now)
        return max(0.0, 1 - self.level) * 60 / self.per_minute

    def take(self, amount: float, now: float) -> None:
        """Take so much; the level may go below 0."""
        self._fill(now)
        self.level -= amount

    def _fill(self, now: float) -> None:
        self.level = min(max(1.0, self.per_minute), self.level + (now - self.at) * self.per_minute / 60)
        self.at = now


class Quotas:
    """The buckets of all keys, by fingerprint. Their number is bounded, since unknown keys are refused earlier.

    Args:
        clock: a monotonic time in seconds.
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
        """Check that a request of this key may begin; a caller without a key (None) always may.

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
        """Charge a request's use to its key."""
        if caller is not None:
            for unit, amount in (("images", images), ("pixels", pixels)):
                if unit in self._limits:
                    self._bucket(caller, unit).take(amount, self._clock())

    def _bucket(self, caller: str, unit: str) -> Bucket:
        limit = self._limits[unit]
        return self._buckets.setdefault((caller, unit), Bucket(limit, max(1.0, limit), self._clock()))


def fingerprint(key: bytes) -> str:
    """Eight hexadecimal digits that identify a key in the log without revealing it."""
    return hashlib.sha256(key).hexdigest()[:8]
