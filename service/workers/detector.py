"""`Detector`: what runs models, as far as `api` knows it. And `Admission`, the bound on its work: one job too many is
refused before anything is done, and what became of each is counted.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from service.errors import CancelledRequestError, OverloadedError, ServiceError
from service.metrics import Metrics
from service.settings import Settings
from service.structures import Answer, Job, ModelInfo

if TYPE_CHECKING:
    # It brings the decoders and encoders along, for which the process that serves HTTP has no use.
    from service.pipeline import Predictor

# Loads the models that the settings name, one after the other. A worker process gets it pickled.
PredictorFactory = Callable[[Settings], "Iterator[Predictor]"]

# What one job is taken to last before the first was measured.
_UNMEASURED_SECONDS = 1.0

# How much of the measured time of a job the next one leaves in place: about the last fifty count.
_TIME_MEMORY = 0.98


class Detector(Protocol):
    """Runs models."""

    async def start(self) -> Sequence[ModelInfo]:
        """Load the models and warm them up; call once.

        Returns:
            What can be asked from now on.

        Raises:
            ServiceError: a model cannot be loaded.
        """

    async def stop(self) -> None:
        """End all work, also when it has not started yet or is just starting."""

    async def run(self, job: Job) -> Answer:
        """Do a job. Cancelling it drops what was not begun.

        Raises:
            ServiceError: see `Pipeline.run`.
        """

    async def load(self, reference: str) -> ModelInfo:
        """Load a further model of the store, by name or name@version, and warm it up.

        Raises:
            ServiceError: it cannot be loaded, and was not.
        """

    async def unload(self, model_key: str) -> None:
        """Forget a model for which no job is under way."""

    def waiting_pixels(self, model_key: str) -> Sequence[int]:
        """Of each image that waits for a device on behalf of one model, its pixels, resized and padded."""

    def memory(self) -> Mapping[tuple[str, str], float]:
        """Bytes by device and kind."""

    @property
    def capacity(self) -> int:
        """Jobs of each priority that may be under way: those that wait for a device, and a batch on each."""

    @property
    def is_alive(self) -> bool:
        """Whether a device is at work, so that requests are answered soon."""

    @property
    def failure(self) -> str | None:
        """Why no device will ever work again; None if there is hope."""


class Admission:
    """The way to a detector. Jobs of each priority have places of their own, so that neither shuts the other out."""

    def __init__(self, detector: Detector, *, metrics: Metrics) -> None:
        self._detector = detector
        self._metrics = metrics
        self._jobs: Counter[bool] = Counter()  # under way, by whether they are bulk
        self._seconds_per_job = _UNMEASURED_SECONDS

    async def run(self, job: Job) -> Answer:
        """Do a job, as `Detector.run` does.

        Raises:
            OverloadedError: too many are under way.
        """
        with self._outcome_counted(job), self._place_taken(is_bulk=job.is_bulk):
            return await self._detector.run(job)

    def require_place(self, *, is_bulk: bool = False) -> None:
        """Raise OverloadedError if a job would be refused now; takes nothing."""
        if self._jobs[is_bulk] >= self._detector.capacity:
            # Little's law: what is under way now will be done after about the time that one job takes.
            raise OverloadedError(
                f"the queue is full: {self._jobs[is_bulk]} images wait or are under way, at most "
                f"{self._detector.capacity}",
                retry_after_seconds=self._seconds_per_job,
            )

    @contextmanager
    def _place_taken(self, *, is_bulk: bool) -> Iterator[None]:
        """Hold one of the detector's places, and learn how long a job takes."""
        self.require_place(is_bulk=is_bulk)
        started_at = time.monotonic()
        self._jobs[is_bulk] += 1
        try:
            yield
            seconds = time.monotonic() - started_at
            self._seconds_per_job += (1 - _TIME_MEMORY) * (seconds - self._seconds_per_job)
        finally:
            self._jobs[is_bulk] -= 1

    @contextmanager
    def _outcome_counted(self, job: Job) -> Iterator[None]:
        outcome = "internal_error"
        try:
            yield
            outcome = "ok"
        except asyncio.CancelledError:
            outcome = CancelledRequestError.code
            self._metrics.cancelled.labels(job.progress.stage).inc()
            raise
        except ServiceError as error:
            outcome = error.code
            raise
        finally:
            self._metrics.images.labels(job.model, outcome).inc()
