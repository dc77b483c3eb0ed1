"""One request: decode, submit, encode. Called by `api` with a job; knows threads, the batcher and the deadline, but
neither HTTP nor networks: whatever runs a model is a `Predictor` to it.

Sizes are (height, width) in pixels, times are in seconds of `time.monotonic`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from service.batching.batcher import Batcher
from service.errors import CancelledRequestError, DeadlineExceededError, OverloadedError, ServiceError
from service.imaging.decode import ImageLimits, decode_image
from service.metrics import Metrics
from service.structures import Detections, DetectOptions, Image, ModelInfo, Prediction, Query

T = TypeVar("T")
E = TypeVar("E")

# What one job is taken to last before the first was measured.
_UNMEASURED_SECONDS = 1.0

# How much of the measured time of a job the next one leaves in place: about the last fifty count.
_TIME_MEMORY = 0.98


class Predictor(Protocol):
    """One loaded model on one device, as far as the service knows it."""

    @property
    def info(self) -> ModelInfo:
        """What callers may know of it."""

    def group_key(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The padded size at which an image of this size runs; images of one padded size may share a batch."""

    def warm_up(self) -> None:
        """Do once what would make the first requests slow."""

    def predict(self, queries: Sequence[Query]) -> Sequence[Prediction]:
        """Answer a batch: one prediction for each query, in order."""


class Progress:
    """Where a request is, and how long each earlier stage took. The pipeline moves it on, whoever reports reads it.

    Attributes:
        stage: the one it is in.
        stage_seconds: by name, for the stages that it has left.
        started_at: when it entered its first stage.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.stage_seconds: dict[str, float] = {}
        self.started_at = self._entered_at = time.monotonic()

    def enter(self, stage: str) -> None:
        """Leave the present stage for another one."""
        now = time.monotonic()
        self.stage_seconds[self.stage] = self.stage_seconds.get(self.stage, 0.0) + now - self._entered_at
        self.stage, self._entered_at = stage, now


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Job:
    """One encoded image and what to find in it.

    Attributes:
        deadline: when the caller will no longer wait.
    """

    predictor: Predictor
    data: bytes
    options: DetectOptions
    deadline: float
    progress: Progress


@dataclass(frozen=True, slots=True, eq=False)
class Answer(Generic[E]):
    """What came of a job.

    Attributes:
        image_size: of the upright image, the frame of the boxes.
        encoded: what the caller's `encode` made of the detections.
        batch_size: how many images shared the batch.
    """

    image_size: tuple[int, int]
    orientation_applied: bool
    detections: Detections
    encoded: E
    batch_size: int


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What waits in the batcher: a query and the model that is to answer it."""

    predictor: Predictor
    query: Query
    padded_pixels: int
    progress: Progress


def predict_batch(batch: Sequence[Work], *, metrics: Metrics) -> Sequence[Prediction]:
    """The batcher's function: answer works of one model together. Runs on the batcher's thread."""
    predictor = batch[0].predictor
    for work in batch:
        work.progress.enter("inference")
    predictions = predictor.predict([work.query for work in batch])
    model = predictor.info.key
    for stage, seconds in predictions[0].stage_seconds.items():
        metrics.stage_duration.labels(stage, model).observe(seconds)
    metrics.batch_size.labels(model).observe(len(batch))
    metrics.batch_padding_ratio.labels(model).observe(predictions[0].padding_ratio)
    return predictions


class Pipeline:
    """The way of every request through the rooms, for all models of a device.

    Args:
        batcher: runs `predict_batch`.
        decoders: threads that decode.
        encoders: threads that encode: others, so that finished answers do not wait behind new images.
        max_jobs: jobs that may be under way; more are refused before they are decoded, which they would be in vain.
    """

    def __init__(
        self,
        *,
        batcher: Batcher[Work, Prediction],
        decoders: ThreadPoolExecutor,
        encoders: ThreadPoolExecutor,
        image_limits: ImageLimits,
        max_jobs: int,
        metrics: Metrics,
    ) -> None:
        self._batcher = batcher
        self._decoders = decoders
        self._encoders = encoders
        self._image_limits = image_limits
        self._max_jobs = max_jobs
        self._metrics = metrics
        self._jobs = 0
        self._submitted: set[Work] = set()
        self._seconds_per_job = _UNMEASURED_SECONDS

    def queue_depth(self, model_key: str) -> int:
        """How many images wait for the device on behalf of one model, `name@version`."""
        return len(self._waiting(model_key))

    def queue_pixels(self, model_key: str) -> int:
        """How many pixels they have, resized and padded."""
        return sum(work.padded_pixels for work in self._waiting(model_key))

    def _waiting(self, model_key: str) -> list[Work]:
        return [
            work for work in self._submitted if work.progress.stage == "queue" and work.predictor.info.key == model_key
        ]

    async def run(self, job: Job, encode: Callable[[Image, Detections], E]) -> Answer[E]:
        """Take one job the whole way. Cancelling it drops what was not begun.

        Args:
            encode: makes of the detections what the caller wants; called in a thread.

        Raises:
            ServiceError: UnsupportedImageError, InvalidImageError or TooLargeError for the image; OverloadedError,
                NotReadyError, DeadlineExceededError or InferenceError for what became of it.
        """
        with self._outcome_counted(job), self._place_taken():
            job.progress.enter("decode")
            image = await self._in_thread(self._decoders, job, self._decode, job.data)
            job.progress.enter("queue")
            prediction = await self._submit(job, image)
            job.progress.enter("encode")
            encoded = await self._in_thread(self._encoders, job, encode, image, prediction.detections)
            job.progress.enter("respond")
        self._observe(job, prediction)
        return Answer(image.size, image.orientation_applied, prediction.detections, encoded, prediction.batch_size)

    def _decode(self, data: bytes) -> Image:
        return decode_image(data, limits=self._image_limits)

    async def _submit(self, job: Job, image: Image) -> Prediction:
        padded_size = job.predictor.group_key(image.size)
        padded_pixels = padded_size[0] * padded_size[1]
        work = Work(job.predictor, Query(image, job.options), padded_pixels, job.progress)
        group = (job.predictor.info.key, padded_size, job.options.roi_op)
        self._submitted.add(work)
        try:
            answer = await self._batcher.submit(work, group=group, cost=padded_pixels, deadline=job.deadline)
        finally:
            self._submitted.remove(work)
        return answer.result

    async def _in_thread(self, threads: ThreadPoolExecutor, job: Job, function: Callable[..., T], *args: object) -> T:
        """Call a function in a thread for as long as the caller waits. One that has begun runs on, in vain."""
        stage = job.progress.stage
        too_late = DeadlineExceededError(f"the deadline passed in the stage {stage!r}", stage=stage)
        seconds_left = job.deadline - time.monotonic()
        if seconds_left <= 0:
            raise too_late
        try:
            async with asyncio.timeout(seconds_left):
                return await asyncio.get_running_loop().run_in_executor(threads, function, *args)
        except TimeoutError:
            raise too_late from None

    @contextmanager
    def _place_taken(self) -> Iterator[None]:
        """Hold one of the `max_jobs` places, and learn how long a job takes."""
        if self._jobs >= self._max_jobs:
            # Little's law: what is under way now will be done after about the time that one job takes.
            raise OverloadedError(
                f"the queue is full: {self._jobs} images wait or are under way, at most {self._max_jobs}",
                retry_after_seconds=self._seconds_per_job,
            )
        started_at = time.monotonic()
        self._jobs += 1
        try:
            yield
            seconds = time.monotonic() - started_at
            self._seconds_per_job += (1 - _TIME_MEMORY) * (seconds - self._seconds_per_job)
        finally:
            self._jobs -= 1

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
            self._metrics.images.labels(job.predictor.info.key, outcome).inc()

    def _observe(self, job: Job, prediction: Prediction) -> None:
        model = job.predictor.info.key
        for stage in ("decode", "queue", "encode"):
            self._metrics.stage_duration.labels(stage, model).observe(job.progress.stage_seconds[stage])
        self._metrics.detections.labels(model).observe(len(prediction.detections))
