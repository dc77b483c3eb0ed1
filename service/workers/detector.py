"""`Detector`: whatever runs models, behind one interface. `Admission`: the bound on its work, which refuses excess jobs
before any work is done and counts the outcome of every job.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from service.batching.backlog import SAFETY, Backlog
from service.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    OverloadedError,
    ServiceError,
)
from service.metrics import Metrics
from service.settings import Settings
from service.structures import Answer, Job, ModelInfo

if TYPE_CHECKING:
    # Importing it loads the decoders and encoders, which the process that serves HTTP does not need.
    from service.pipeline import Predictor

# Loads the models that the settings name, one after the other. It is pickled for worker processes.
PredictorFactory = Callable[[Settings], "Iterator[Predictor]"]


class Detector(Protocol):
    """Runs models."""

    async def start(self) -> Sequence[ModelInfo]:
        """Load the models and warm them up; call once.

        Returns:
            The models that are served from now on.

        Raises:
            ServiceError: a model cannot be loaded.
        """

    async def stop(self) -> None:
        """End all work. May be called before or during `start`."""

    async def run(self, job: Job) -> Answer:
        """Do a job. Cancelling it drops the work that has not begun.

        Raises:
            ServiceError: see `Pipeline.run`.
        """

    async def load(self, reference: str) -> ModelInfo:
        """Load a further model of the store, by name or name@version, and warm it up.

        Raises:
            ServiceError: it cannot be loaded; nothing has changed.
        """

    async def unload(self, model_key: str) -> None:
        """Unload a model; it must have no jobs under way."""

    def waiting_pixels(self, model_key: str) -> Sequence[int]:
        """The resized and padded pixels of each image that waits for a device, for one model."""

    def memory(self) -> Mapping[tuple[str, str], float]:
        """Bytes by device and kind."""

    @property
    def capacity(self) -> int:
        """Entries of jobs of each priority that may be under way: those that wait for a device, and one batch on each
        device.
        """

    @property
    def is_alive(self) -> bool:
        """Whether a device is at work, so that requests are answered soon."""

    @property
    def failure(self) -> str | None:
        """Why no device is expected to work soon; None if one works or is about to."""


class Admission:
    """Admits jobs to a detector. Each priority has its own places, so that neither shuts the other out. A job that
    could not be done before its deadline is refused: its caller had better ask elsewhere, or later.
    """

    def __init__(self, detector: Detector, *, metrics: Metrics) -> None:
        self._detector = detector
        self._metrics = metrics
        self._backlogs = {False: Backlog(), True: Backlog()}  # by whether they are bulk

    async def run(self, job: Job) -> Answer:
        """Do a job, as `Detector.run` does.

        Raises:
            OverloadedError: too many jobs are under way.
        """
        with self._outcome_counted(job), self._place_taken(job):
            return await self._detector.run(job)

    def require_place(self, *, seconds_left: float, is_bulk: bool = False, cost: int = 1, places: int = 1) -> None:
        """Raise OverloadedError if a job would be refused now; takes nothing.

        Args:
            seconds_left: until its deadline.
            cost: its pixels, or a guess.
            places: how many it needs.
        """
        backlog = self._backlogs[is_bulk]
        seconds = backlog.seconds_until_done(cost)
        if backlog.count + places > self._detector.capacity:
            raise OverloadedError(
                f"the queue is full: {backlog.count} images wait or are under way, at most {self._detector.capacity}",
                retry_after_seconds=seconds,
            )
        if not backlog.is_in_time(cost, seconds_left):
            raise OverloadedError(
                f"{backlog.count} images wait or are under way; one more would be done in {seconds:.1f} s, more "
                f"than {SAFETY:.0%} of the {seconds_left:.1f} s until its deadline",
                retry_after_seconds=seconds - SAFETY * max(seconds_left, 0.0),
            )

    @contextmanager
    def _place_taken(self, job: Job) -> Iterator[None]:
        """Hold its places, one for each of its entries, and learn how long jobs take."""
        backlog, cost, places = self._backlogs[job.is_bulk], job.likely_pixels, job.entries
        seconds_left = job.deadline - time.monotonic()
        self.require_place(seconds_left=seconds_left, is_bulk=job.is_bulk, cost=cost, places=places)
        backlog.add(cost, places=places)
        work: int | None = cost
        try:
            yield
        except DeadlineExceededError:
            work = 0  # the time was spent in vain
            raise
        except (ServiceError, asyncio.CancelledError):
            work = None  # how long it took to refuse or convict it says nothing about the device's speed
            raise
        finally:
            backlog.remove(cost, work=work, places=places)

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
