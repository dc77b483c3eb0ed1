"""Remembers suspects after their requests have ended: in how many worker deaths each was alone. Callers retry what
failed, and without this memory each retry of an image that kills or hangs workers would cost several more of them.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace

from service.structures import Coco, Encoded, Job

_MAX_SIZE = 1000
REMEMBERED_SECONDS = 3600.0


class KnownSuspects:
    """The records of suspects. Jobs with the same image bytes, model, options and answer form share a record.

    Args:
        max_size: most records; the oldest is dropped first.
        seconds: after which a record is forgotten.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        *,
        max_size: int = _MAX_SIZE,
        seconds: float = REMEMBERED_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_size = max_size
        self._seconds = seconds
        self._clock = clock
        self._records: OrderedDict[Hashable, tuple[int, int, float]] = OrderedDict()  # length, deaths, expiry
        self._lengths: Counter[int] = Counter()

    def deaths_alone(self, job: Job) -> int | None:
        """In how many deaths a suspect was alone; None for a job that is not a suspect."""
        self._expire()
        if self._lengths[_length(job)] == 0:
            return None  # nearly always, and without computing a digest
        record = self._records.get(_key(job))
        return None if record is None else record[1]

    def remember(self, job: Job, deaths_alone: int) -> None:
        """Keep the record of a suspect; its count is never lowered."""
        deaths_alone = max(deaths_alone, self.deaths_alone(job) or 0)
        key = _key(job)
        self._remove(key)
        self._records[key] = _length(job), deaths_alone, self._clock() + self._seconds
        self._lengths[_length(job)] += 1
        if len(self._records) > self._max_size:
            self._remove(next(iter(self._records)))

    def forget(self, job: Job) -> None:
        """Drop the record of a job that has proved harmless."""
        if self._lengths[_length(job)] > 0:
            self._remove(_key(job))

    def _expire(self) -> None:
        now = self._clock()
        while self._records and next(iter(self._records.values()))[2] <= now:
            self._remove(next(iter(self._records)))

    def _remove(self, key: Hashable) -> None:
        if (record := self._records.pop(key, None)) is not None:
            self._lengths[record[0]] -= 1
            if self._lengths[record[0]] == 0:
                del self._lengths[record[0]]


def _length(job: Job) -> int:
    return len(job.source.data) if isinstance(job.source, Encoded) else job.source.array.nbytes


def _key(job: Job) -> Hashable:
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(job.source, Encoded):
        digest.update(job.source.intensity.encode())
        digest.update(job.source.data)
    else:
        digest.update(repr(job.source.array.shape).encode())
        digest.update(job.source.array.tobytes())
    # What the caller calls the image does not matter.
    form = replace(job.form, image_id=0) if isinstance(job.form, Coco) else job.form
    return digest.digest(), job.model, job.options, form
