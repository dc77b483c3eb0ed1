"""A small model for tests of the service: what it finds is written in the picture, so answers can be checked by hand.
It can hold the device, and fail.
"""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import PIL.Image

from service.errors import ModelStoreError, OutOfMemoryError
from service.settings import Settings
from service.structures import Detections, Image, ModelInfo, Prediction, Query

FAKE_INFO = ModelInfo(
    name="fake",
    version=1,
    architecture="mask_rcnn",
    backbone="none",
    roi_op="roi_align",
    labels=("cat", "dog"),
    score_thresh=0.05,
    max_detections=100,
    has_masks=True,
    engine="eager",
    precision="float32",
    device="cpu",
    roi_ops=("roi_pool", "roi_align"),
)
FAKE_BOXES_INFO = replace(FAKE_INFO, name="fake-boxes", architecture="faster_rcnn", has_masks=False, roi_ops=())

# A picture whose top left pixel has this red value makes the model fail.
POISON = 13
# These end the process that works on them, or keep it for ever.
KILLER = 14
HANG = 15
NO_LIMIT = 10**12


class FakePredictor:
    """Finds two objects in every picture: a cat that is its left half, with the picture's mean red / 255 as its score,
    and a dog that is its green part, or all of it if nothing is green, with a tenth of that. Takes every proposal of
    the caller for such a cat.

    Attributes:
        batches: the number of images of each batch.
        device_is_free: clear it to hold the device.
        device_is_busy: set while a batch is on the device.
        may_warm_up: clear it to hold the warm-up.
        memory_pixels: how many pixels it can take at once.
        releases: how often it was asked to release memory.
    """

    def __init__(self, info: ModelInfo = FAKE_INFO, *, warm_up_error: Exception | None = None) -> None:
        self.info = info
        self.batches: list[int] = []
        self.device_is_free = threading.Event()
        self.device_is_free.set()
        self.device_is_busy = threading.Event()
        self.may_warm_up = threading.Event()
        self.may_warm_up.set()
        self.memory_pixels = NO_LIMIT
        self.releases = 0
        self._warm_up_error = warm_up_error

    def group_key(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The size in steps of 32, as networks pad."""
        height, width = image_size
        return -(-height // 32) * 32, -(-width // 32) * 32

    def begin_upload(self, image: Image) -> Image:
        return image

    def warm_up(self) -> None:
        self.may_warm_up.wait()
        if self._warm_up_error is not None:
            raise self._warm_up_error

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        self.device_is_busy.set()
        self.device_is_free.wait()
        self.device_is_busy.clear()
        self.batches.append(len(queries))
        if sum(query.image.width * query.image.height for query in queries) > self.memory_pixels:
            sizes = ", ".join(f"{query.image.width}x{query.image.height}" for query in queries)
            raise OutOfMemoryError(f"not enough memory for a batch of {len(queries)} ({sizes})")
        marks = {int(query.image.pixels[0, 0, 0]) for query in queries}
        if POISON in marks:
            raise RuntimeError("the device cannot bear this picture")
        if KILLER in marks:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANG in marks:
            threading.Event().wait()
        stage_seconds = {"backbone": 0.001, "roi_heads": 0.001}
        return [Prediction(self._detect(query), stage_seconds, len(queries)) for query in queries]

    def release_memory(self) -> None:
        self.releases += 1

    def _detect(self, query: Query) -> Detections:
        height, width = query.image.size
        red = np.float32(query.image.pixels[:, :, 0].mean() / 255)
        ys, xs = np.nonzero(query.image.pixels[:, :, 1] > 128)
        dog = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else [0, 0, width, height]
        boxes = np.array([[0, 0, width / 2, height], dog], np.float32)
        labels, scores = np.array([1, 2]), np.array([red, red / 10], np.float32)
        options = query.options
        if options.proposals is not None:
            boxes = np.array(options.proposals, np.float32).reshape(-1, 4)
            labels, scores = np.ones(len(boxes), np.int64), np.full(len(boxes), red)
        kept = scores > (self.info.score_thresh if options.score_thresh is None else options.score_thresh)
        if options.label_ids is not None:
            kept &= np.isin(labels, list(options.label_ids))
        indices = np.flatnonzero(kept)[: options.max_detections]
        masks = np.ones((len(indices), 28, 28), np.float32) if self.info.has_masks and options.with_masks else None
        extras = {}
        if "class_scores" in options.extras:
            # What is not the object's own class is background.
            class_scores = np.zeros((len(indices), 1 + len(self.info.labels)), np.float32)
            class_scores[:, 0] = 1 - scores[indices]
            class_scores[np.arange(len(indices)), labels[indices]] = scores[indices]
            extras = {"class_scores": class_scores}
        return Detections(boxes[indices], labels[indices], scores[indices], masks, extras)


def picture(*, red: int = 255, height: int = 48, width: int = 64, image_format: str = "PNG") -> bytes:
    """An encoded picture of one colour."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (red, 0, 0)).save(buffer, image_format)
    return buffer.getvalue()


class SlowPredictor(FakePredictor):
    """Takes its time over every batch, so that something can happen meanwhile."""

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        time.sleep(0.02)
        return super().predict(queries)


def load_fakes(settings: Settings) -> Iterator[FakePredictor]:
    """A factory for worker processes: `fake@1`, or the models that the settings name; `broken` cannot be loaded."""
    for reference in settings.models or ("fake",):
        name, _, version = reference.partition("@")
        if name == "broken":
            raise ModelStoreError("broken/1/weights.safetensors is not what it says")
        yield SlowPredictor(replace(FAKE_INFO, name=name, version=int(version or 1), device=settings.device))


def load_telling(settings: Settings) -> Iterator[FakePredictor]:
    """A factory for worker processes: the model's engine tells how the worker is to divide the cores."""
    told = f"{settings.workers} sharing, {settings.decode_threads} decoding"
    yield FakePredictor(replace(FAKE_INFO, engine=told))
