"""One request: decode, submit, encode. Called by `workers` with a job; knows threads, the batcher and the deadline, but
neither HTTP nor networks: whatever runs a model is a `Predictor` to it.

Sizes are (height, width) in pixels, times are in seconds of `time.monotonic`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import orjson

from service.batching.batcher import Batcher
from service.batching.held_pixels import HeldPixels, PixelHolding
from service.batching.queue import Priority
from service.errors import DeadlineExceededError, NotReadyError, OutOfMemoryError
from service.imaging.decode import ImageLimits, decode_image
from service.imaging.overlay import draw_detections, encode_picture
from service.masks.png import encode_crops, encode_png
from service.masks.polygons import encode_polygons
from service.masks.rle import encode_rle
from service.metrics import Observe
from service.structures import (
    Answer,
    Detections,
    Image,
    Job,
    MaskFormat,
    ModelInfo,
    PictureType,
    Prediction,
    Progress,
    Query,
)

T = TypeVar("T")

# To encode a mask takes time in proportion to the sides of its box: this is some 2 ms, far above what a thread costs.
_SIDES_PER_PART_PIXELS = 20_000
_MOST_PARTS = 4

MASK_ENCODERS: Mapping[MaskFormat, Callable[..., Sequence[object]]] = {
    "rle": encode_rle,
    "polygons": encode_polygons,
    "png": encode_png,
    "crop": encode_crops,
}


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
        """Answer a batch: one prediction for each query, in order. Raises OutOfMemoryError for lack of memory."""

    def release_memory(self) -> None:
        """Free what the device holds in reserve, after a lack of memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What waits in the batcher: a query and the model that is to answer it."""

    predictor: Predictor
    query: Query
    padded_pixels: int
    progress: Progress


@dataclass(slots=True, eq=False)
class Errand:
    """Something else to be done on the batcher's thread, such as a warm-up: never beside a batch, for much of what runs
    networks bears one thread only.

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


def run_batch(batch: Sequence[Work | Errand], *, observe: Observe) -> Sequence[Prediction | None]:
    """The batcher's function: answer works of one model together, or run errands. Runs on the batcher's thread."""
    for errand in batch:
        if isinstance(errand, Errand):
            errand.run()
    works = [work for work in batch if isinstance(work, Work)]
    return _predict(works, observe) if works else [None] * len(batch)


def _predict(batch: Sequence[Work], observe: Observe) -> Sequence[Prediction]:
    predictor = batch[0].predictor
    with ExitStack() as at_risk:
        for work in batch:
            work.progress.enter("inference")
            at_risk.enter_context(work.progress.at_risk("inference"))
        predictions = predictor.predict([work.query for work in batch])
    model = predictor.info.key
    for stage, seconds in predictions[0].stage_seconds.items():
        observe("stage_duration", (stage, model), seconds)
    observe("batch_size", (model,), len(batch))
    observe("batch_padding_ratio", (model,), predictions[0].padding_ratio)
    return predictions


def release_memory(batch: Sequence[Work | Errand]) -> None:
    """The batcher's function after a lack of memory for these works."""
    if isinstance(batch[0], Work):
        batch[0].predictor.release_memory()


def encode_json(image: Image, detections: Detections, info: ModelInfo, mask_format: MaskFormat) -> bytes:
    """The detections as the JSON array that the answer to a request holds; see `api/schemas.py`."""
    labels = detections.labels.tolist()
    found: list[dict[str, Any]] = [
        {"box": box, "label": info.labels[label_id - 1], "label_id": label_id, "score": score}
        for box, label_id, score in zip(detections.boxes, labels, detections.scores, strict=True)
    ]
    if mask_format != "none" and detections.masks is not None:
        masks = MASK_ENCODERS[mask_format](detections.masks, detections.boxes, image.size)
        for detection, mask in zip(found, masks, strict=True):
            detection["mask"] = mask
    return orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY)


def parts_of(detections: Detections) -> list[Detections]:
    """Split what takes long to encode, in order, so that several threads can share it."""
    if detections.masks is None:
        return [detections]
    boxes = detections.boxes
    number = min(max(1, int((boxes[:, 2:] - boxes[:, :2]).sum()) // _SIDES_PER_PART_PIXELS), _MOST_PARTS)
    fields = (boxes, detections.labels, detections.scores, detections.masks)
    return [Detections(*part) for part in zip(*(np.array_split(field, number) for field in fields), strict=True)]


def encode_drawing(image: Image, detections: Detections, info: ModelInfo, picture_type: PictureType) -> bytes:
    """The image with the detections drawn into it."""
    drawn = draw_detections(image, detections, info.labels)
    return encode_picture(drawn, "png" if picture_type == "image/png" else "jpeg")


class Pipeline:
    """The way of every request through the rooms, for all models of a device.

    Args:
        batcher: runs `run_batch`.
        decoders: threads that decode.
        encoders: threads that encode: others, so that finished answers do not wait behind new images.
        held_pixels: bounds what the decoded images hold together, each from its decoding to its answer.
        predictors: the loaded models by their keys; looked up anew for each job.
        observe: takes the times of the stages and the numbers of detections.
        batch_policy: which images may share a batch, see `Settings`.
    """

    def __init__(
        self,
        *,
        batcher: Batcher[Work | Errand, Prediction | None],
        decoders: Executor,
        encoders: Executor,
        image_limits: ImageLimits,
        held_pixels: HeldPixels,
        predictors: Mapping[str, Predictor],
        observe: Observe,
        batch_policy: Literal["exact", "padded"] = "exact",
    ) -> None:
        self._batcher = batcher
        self._decoders = decoders
        self._encoders = encoders
        self._image_limits = image_limits
        self._held_pixels = held_pixels
        self._predictors = predictors
        self._observe = observe
        self._batch_policy = batch_policy
        self._submitted: set[Work] = set()

    def waiting_pixels(self, model_key: str) -> Sequence[int]:
        """Of each image that waits for the device on behalf of one model, its pixels, resized and padded."""
        return [
            work.padded_pixels
            for work in self._submitted
            if work.progress.stage == "queue" and work.predictor.info.key == model_key
        ]

    async def run(self, job: Job) -> Answer:
        """Take one job the whole way. Cancelling it drops what was not begun.

        Raises:
            ServiceError: UnsupportedImageError, InvalidImageError or TooLargeError for the image; OverloadedError,
                NotReadyError, DeadlineExceededError or InferenceError for what became of it.
        """
        with self._held_pixels.hold(resting=job.progress.resting) as holding:
            image, prediction = await self._detect(job, holding)
            job.progress.enter("encode")
            encoded = await self._encode(job, image, prediction.detections)
        job.progress.enter("respond")
        for stage in ("decode", "queue", "encode"):
            self._observe("stage_duration", (stage, job.model), job.progress.stage_seconds[stage])
        found = len(prediction.detections)
        self._observe("detections", (job.model,), found)
        return Answer(image.size, image.orientation_applied, found, prediction.batch_size, encoded)

    async def detect(self, job: Job) -> tuple[Image, Prediction]:
        """As `run`, but for the encoding: the decoded image and what was found in it."""
        with self._held_pixels.hold(resting=job.progress.resting) as holding:
            return await self._detect(job, holding)

    async def _detect(self, job: Job, holding: PixelHolding) -> tuple[Image, Prediction]:
        predictor = self._predictor(job.model)
        job.progress.enter("decode")
        image = await self._in_thread(self._decoders, job, self._decode, job, holding)
        job.progress.enter("queue")
        return image, await self._submit(job, predictor, image)

    def _predictor(self, model_key: str) -> Predictor:
        predictor = self._predictors.get(model_key)
        if predictor is None:
            raise NotReadyError(f"the model {model_key} is not loaded any more")
        return predictor

    def _decode(self, job: Job, holding: PixelHolding) -> Image:
        with job.progress.at_risk("decode"):
            return decode_image(job.data, limits=self._image_limits, before_decoding=holding.take)

    async def _encode(self, job: Job, image: Image, detections: Detections) -> bytes:
        if job.output == "image/png" or job.output == "image/jpeg":
            return await self._in_thread(self._encoders, job, self._encode_part, job, image, detections)
        parts = await asyncio.gather(
            *(
                self._in_thread(self._encoders, job, self._encode_part, job, image, part)
                for part in parts_of(detections)
            )
        )
        # Each is a JSON array.
        return b"[" + b",".join(part[1:-1] for part in parts) + b"]"

    def _encode_part(self, job: Job, image: Image, detections: Detections) -> bytes:
        info = self._predictor(job.model).info
        try:
            with job.progress.at_risk("encode"):
                if job.output == "image/png" or job.output == "image/jpeg":
                    return encode_drawing(image, detections, info, job.output)
                return encode_json(image, detections, info, job.output)
        except MemoryError:
            raise OutOfMemoryError(f"not enough memory to encode the answer as {job.output}") from None

    async def _submit(self, job: Job, predictor: Predictor, image: Image) -> Prediction:
        padded_size = predictor.group_key(image.size)
        padded_pixels = padded_size[0] * padded_size[1]
        work = Work(predictor, Query(image, job.options), padded_pixels, job.progress)
        job.progress.queued(padded_pixels)
        self._submitted.add(work)
        try:
            answer = await self._batcher.submit(
                work,
                group=(job.model, job.options.roi_op, padded_size if self._batch_policy == "exact" else None),
                cost=padded_pixels,
                shape=padded_size,
                deadline=job.deadline,
                priority=Priority.BULK if job.is_bulk else Priority.INTERACTIVE,
            )
        finally:
            self._submitted.remove(work)
        assert answer.result is not None
        return answer.result

    async def run_errand(self, function: Callable[[], object]) -> None:
        """Call a function on the batcher's thread, when its turn comes; raises what it raises.

        Raises:
            OverloadedError: the queue is full.
            NotReadyError: the batcher is stopping.
        """
        errand = Errand(function)
        await self._batcher.submit(errand, group=errand, cost=1)
        if errand.error is not None:
            raise errand.error

    async def _in_thread(self, threads: Executor, job: Job, function: Callable[..., T], *args: object) -> T:
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
