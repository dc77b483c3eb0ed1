"""Takes one job through its stages: decode, submit, encode. Knows threads, the batcher and the deadline, but neither
HTTP nor networks: whatever runs a model is a `Predictor` to it.

Sizes are (height, width) in pixels, times are in seconds of `time.monotonic`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Literal, Protocol, TypeVar

from service.answers import encoder_for
from service.answers.encoder import Encoder
from service.batching.batcher import Batcher
from service.batching.held_pixels import HeldPixels, PixelHolding
from service.batching.queue import Priority
from service.errors import (
    AnswerTooLargeError,
    CancelledRequestError,
    DeadlineExceededError,
    NotReadyError,
    OutOfMemoryError,
)
from service.imaging.decode import ImageLimits, JpegDecoder, decode_image
from service.metrics import Observe
from service.structures import (
    Answer,
    Detections,
    Drawing,
    Encoded,
    Image,
    Job,
    Json,
    ModelInfo,
    Prediction,
    Progress,
    Query,
    at_risk,
)
from service.tasks import all_of

T = TypeVar("T")

# Parts of one answer that may be encoding or waiting for a thread at a time, so that other jobs get threads too.
_PARTS_AT_A_TIME = 4
# What decodes or encodes for longer than some ten milliseconds does so in the background.
_LARGE_PIXELS = 4_000_000
_MANY_PARTS = 2
# What is joined faster than a thread starts.
_QUICK_BYTES = 256 * 1024
# How long a free device waits for images of a batch request that are being decoded, so that they share a batch.
_MATES_SECONDS = 0.1


class Predictor(Protocol):
    """One loaded model on one device: all that the service needs to know of it."""

    @property
    def info(self) -> ModelInfo:
        """What callers may know of it."""

    def group_key(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The padded size at which an image of this size runs; images of one padded size may share a batch."""

    def begin_upload(self, image: Image) -> Image:
        """Begin to bring a decoded image to the device; called on a decoding thread. Returns it, ready for a query."""

    def warm_up(self) -> None:
        """Do the one-time work that would otherwise slow down the first requests."""

    def predict(self, queries: Sequence[Query]) -> Sequence[Prediction]:
        """Answer a batch: one prediction for each query, in order. Raises OutOfMemoryError for lack of memory."""

    def release_memory(self) -> None:
        """Free what the device holds in reserve, after a lack of memory."""


@dataclass(slots=True, eq=False)
class Work:
    """What waits in the batcher: a query and the model that will answer it.

    Attributes:
        waits: whether it has not reached the device yet, even if another entry of its job has.
    """

    predictor: Predictor
    query: Query
    padded_pixels: int
    progress: Progress
    waits: bool = True


@dataclass(slots=True, eq=False)
class ThreadTask:
    """Something else to run on the batcher's thread, such as a warm-up. It never runs beside a batch: much of the code
    that runs networks is safe on one thread only.

    Attributes:
        error: what the function raised.
    """

    function: Callable[[], object]
    error: Exception | None = None

    def run(self) -> None:
        """Call the function."""
        try:
            self.function()
        except Exception as error:
            self.error = error


def run_batch(batch: Sequence[Work | ThreadTask], *, observe: Observe) -> Sequence[Prediction | None]:
    """The batcher's `predict`: answer queries to one model together, or run tasks. Runs on the batcher's thread."""
    for task in batch:
        if isinstance(task, ThreadTask):
            task.run()
    works = [work for work in batch if isinstance(work, Work)]
    return _predict(works, observe) if works else [None] * len(batch)


def _predict(batch: Sequence[Work], observe: Observe) -> Sequence[Prediction]:
    predictor = batch[0].predictor
    batch_id = uuid.uuid4().hex
    for work in batch:
        work.waits = False
        work.progress.batch_id = batch_id
        work.progress.enter("inference")
    with at_risk([work.progress for work in batch], "inference"):
        predictions = predictor.predict([work.query for work in batch])
    model = predictor.info.key
    trace_id = next((work.progress.trace_id for work in batch if work.progress.trace_id), None)
    for stage, seconds in predictions[0].stage_seconds.items():
        observe("stage_duration", (stage, model), seconds, trace_id)
    observe("batch_size", (model,), len(batch))
    observe("batch_padding_ratio", (model,), predictions[0].padding_ratio)
    if predictions[0].overflowed:
        observe("overflowed_batches", (model,), 1)
    if predictions[0].uncompiled:
        observe("uncompiled_batches", (model,), 1)
    return predictions


def release_memory(batch: Sequence[Work | ThreadTask]) -> None:
    """The batcher's `release_memory`, after there was not enough memory for these items."""
    if isinstance(batch[0], Work):
        batch[0].predictor.release_memory()


class Plan(Protocol):
    """How one image is split into several entries of the batcher, such as tiles, and their predictions are merged."""

    def split(self, image: Image) -> Sequence[Query]:
        """What to ask the model; at least one query."""

    def merge(self, image: Image, predictions: Sequence[Prediction]) -> Prediction:
        """One prediction in the frame of the image, from one for each query, in order."""


@dataclass(frozen=True, slots=True, eq=False)
class WholeImage:
    """The plan of most jobs: one query for the whole image."""

    job: Job

    def split(self, image: Image) -> Sequence[Query]:
        """The image as it is."""
        return [Query(image, self.job.options)]

    def merge(self, image: Image, predictions: Sequence[Prediction]) -> Prediction:
        """The only prediction."""
        [prediction] = predictions
        return prediction


class _LargeImageError(CancelledRequestError):
    """Found at the head of an image: it is to be decoded in the background."""


class Pipeline:
    """Takes every job from its source to its answer, for all models of a device.

    Args:
        batcher: runs `run_batch`.
        decoders: threads that decode.
        encoders: threads that encode; separate, so that finished answers do not wait behind new images.
        held_pixels: bounds the pixels of all decoded images together, each from its decoding to its answer.
        predictors: the loaded models by their keys; looked up anew for each job.
        observe: records the times of the stages and the numbers of detections.
        batch_policy: which images may share a batch, see `Settings`.
        max_answer_bytes: largest answer in JSON, see `Settings`.
        plan_for: chooses how a job's image is split.
        background: threads for large images and long answers, so that these take little time from batches and from
            other jobs; None to treat all alike.

    Attributes:
        jpeg_decoder: see `decode_image`.
    """

    def __init__(
        self,
        *,
        batcher: Batcher[Work | ThreadTask, Prediction | None],
        decoders: Executor,
        encoders: Executor,
        image_limits: ImageLimits,
        held_pixels: HeldPixels,
        predictors: Mapping[str, Predictor],
        observe: Observe,
        batch_policy: Literal["exact", "bucketed", "padded"] = "exact",
        max_answer_bytes: int = 64 * 1024 * 1024,
        plan_for: Callable[[Job], Plan] = WholeImage,
        background: Executor | None = None,
    ) -> None:
        self._batcher = batcher
        self._decoders = decoders
        self._encoders = encoders
        self._image_limits = image_limits
        self._held_pixels = held_pixels
        self._predictors = predictors
        self._observe = observe
        self._batch_policy = batch_policy
        self._max_answer_bytes = max_answer_bytes
        self._plan_for = plan_for
        self._background = background
        self.jpeg_decoder: JpegDecoder | None = None
        self._submitted: set[Work] = set()
        self._coming: set[Job] = set()  # bulk jobs, from the start of their decoding until they are submitted

    def waiting_pixels(self, model_key: str) -> Sequence[int]:
        """The resized and padded pixels of each image that waits for the device, for one model."""
        return [work.padded_pixels for work in self._submitted if work.waits and work.predictor.info.key == model_key]

    async def run(self, job: Job) -> Answer:
        """Take one job from its source to its answer. Cancelling it drops the work that has not begun.

        Raises:
            ServiceError: UnsupportedImageError, InvalidImageError or TooLargeError if the image is to blame;
                OverloadedError, NotReadyError, DeadlineExceededError or InferenceError if it was not processed;
                AnswerTooLargeError if there is too much to answer.
        """
        with self._held_pixels.hold(resting=job.progress.resting) as holding:
            image, prediction = await self._detect(job, holding)
            job.progress.enter("encode")
            encoded = await self._encode(job, image, prediction.detections, holding)
        job.progress.enter("respond")
        for stage in ("decode", "queue", "encode"):
            seconds = job.progress.stage_seconds[stage]
            self._observe("stage_duration", (stage, job.model), seconds, job.progress.trace_id)
        found = len(prediction.detections)
        self._observe("detections", (job.model,), found)
        return Answer(
            image_size=image.size,
            orientation_applied=image.orientation_applied,
            detections=found,
            batch_size=prediction.batch_size,
            pieces=[encoded],
            batch_id=job.progress.batch_id,
            left_out=encoder_for(job.form).left_out(prediction.detections),
        )

    async def detect(self, job: Job) -> tuple[Image, Prediction]:
        """Like `run` without the encoding: the decoded image and what was found in it."""
        with self._held_pixels.hold(resting=job.progress.resting) as holding:
            return await self._detect(job, holding)

    async def _detect(self, job: Job, holding: PixelHolding) -> tuple[Image, Prediction]:
        predictor = self._predictor(job.model)
        job.progress.enter("decode")
        if job.is_bulk:
            self._coming.add(job)
        try:
            image = await self._decoded(job, holding, predictor)
        except BaseException:
            self._coming.discard(job)
            raise
        job.progress.enter("queue")
        plan = self._plan_for(job)
        submit = partial(self._submit, job, predictor)
        return image, plan.merge(image, await all_of(submit, plan.split(image), at_a_time=job.entries))

    def _predictor(self, model_key: str) -> Predictor:
        predictor = self._predictors.get(model_key)
        if predictor is None:
            raise NotReadyError(f"the model {model_key} is not loaded any more")
        return predictor

    async def _decoded(self, job: Job, holding: PixelHolding, predictor: Predictor) -> Image:
        """The decoded image; the size of an encoded one is known only when a thread has read its header."""

        def decode(is_small: bool) -> Image:
            return predictor.begin_upload(self._decode(job, holding, is_small))

        try:
            return await self._in_thread(self._decoders, job, decode, self._background is not None)
        except _LargeImageError:
            assert self._background is not None
            return await self._in_thread(self._background, job, decode, False)

    def _decode(self, job: Job, holding: PixelHolding, is_small: bool) -> Image:
        def before_decoding(pixels: int) -> None:
            if is_small and pixels > _LARGE_PIXELS:
                raise _LargeImageError
            holding.take(pixels)

        with at_risk([job.progress], "decode"):
            if isinstance(job.source, Encoded):
                return decode_image(
                    job.source.data,
                    limits=self._image_limits,
                    intensity=job.source.intensity,
                    before_decoding=before_decoding,
                    should_stop=lambda: holding.is_over,
                    jpeg_decoder=self.jpeg_decoder,
                )
            height, width = job.source.array.shape[:2]
            self._image_limits.check((height, width))
            before_decoding(height * width)
            return Image(job.source.array)

    async def _encode(self, job: Job, image: Image, detections: Detections, holding: PixelHolding) -> bytes:
        encoder = encoder_for(job.form)
        self._check_size(job, encoder, image, detections, encoder.least_bytes(image.size, detections))
        info = self._predictor(job.model).info
        size, lock = 0, Lock()

        def encode(part: Detections) -> list[bytes]:
            nonlocal size
            pieces = []
            try:
                with at_risk([job.progress], "encode"):
                    for piece in encoder.encode(image, part, info, should_stop=lambda: holding.is_over):
                        pieces.append(piece)
                        with lock:
                            size += len(piece)
                        self._check_size(job, encoder, image, detections, size)
            except MemoryError:
                raise OutOfMemoryError(f"not enough memory to encode the answer as {type(job.form).__name__}") from None
            return pieces

        split = encoder.split(detections)
        is_long = len(split) > _MANY_PARTS or (
            isinstance(job.form, Drawing) and image.height * image.width > _LARGE_PIXELS
        )
        threads = self._background if is_long and self._background is not None else self._encoders
        encode_in_thread = partial(self._in_thread, threads, job, encode)
        parts = await all_of(encode_in_thread, split, at_a_time=_PARTS_AT_A_TIME)
        is_quick = size < _QUICK_BYTES
        return encoder.join(parts) if is_quick else await self._in_thread(threads, job, encoder.join, parts)

    def _check_size(self, job: Job, encoder: Encoder, image: Image, detections: Detections, size: int) -> None:
        """Refuse an answer that is known to have at least `size` bytes, if that is too many."""
        if encoder.smaller is not None and size > self._max_answer_bytes:
            masks = f" with masks={job.form.masks}" if isinstance(job.form, Json) else ""
            raise AnswerTooLargeError(
                f"the answer, {len(detections)} detections{masks} in {image.width} x {image.height} "
                f"pixels, would have more than {self._max_answer_bytes} bytes; ask for {encoder.smaller}, or for fewer "
                f"detections with {encoder.fewer}"
            )

    async def _submit(self, job: Job, predictor: Predictor, query: Query) -> Prediction:
        padded_size = predictor.group_key(query.image.size)
        padded_pixels = padded_size[0] * padded_size[1]
        work = Work(predictor, query, padded_pixels, job.progress)
        job.progress.queued(padded_pixels)
        self._submitted.add(work)
        self._coming.discard(job)
        try:
            prediction = await self._batcher.submit(
                work,
                group=(job.model, query.options.roi_op, None if self._batch_policy == "padded" else padded_size),
                cost=padded_pixels,
                shape=padded_size,
                deadline=job.deadline,
                priority=Priority.BULK if job.is_bulk else Priority.INTERACTIVE,
                mates_seconds=_MATES_SECONDS if job.is_bulk and self._coming else 0.0,
            )
        finally:
            self._submitted.remove(work)
        assert prediction is not None
        return prediction

    async def run_on_device_thread(self, function: Callable[[], object]) -> None:
        """Call a function on the batcher's thread when its turn comes; raises what it raises.

        Raises:
            OverloadedError: the queue is full.
            NotReadyError: the batcher is stopping.
        """
        task = ThreadTask(function)
        await self._batcher.submit(task, group=task, cost=1, is_typical=False)
        if task.error is not None:
            raise task.error

    async def _in_thread(self, threads: Executor, job: Job, function: Callable[..., T], *args: object) -> T:
        """Call a function in a thread, and wait until the deadline. A call that has begun then runs on, in vain."""
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
