"""`Predictor`: one network on one device, called with decoded images and answering in their own pixels. Called by the
batcher's thread and by offline commands; one call at a time. Knows nothing of HTTP, queues or files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

from service.errors import InferenceError, OutOfMemoryError
from service.inference.memory import is_out_of_memory, release_memory
from service.modeling.generalized_rcnn import GeneralizedRCNN, ImageDetections, StageTimer
from service.modeling.roi_heads import Selection
from service.ops.devices import upload
from service.structures import Detections, DetectOptions, Image, ModelInfo, Prediction, Query

WARM_UP_SIZE = (256, 352)
"""(height, width) of the pictures that `warm_up` runs. No square: code compiled for it would fit squares only."""


class Predictor:
    """One network on one device.

    Args:
        model: the network with its weights, on `device`.
        info: what callers may know of it, with its default thresholds.
        device: where the network is.
        autocast_dtype: run convolutions and matrix products in this type; None for float32 throughout.
    """

    def __init__(
        self,
        model: GeneralizedRCNN,
        *,
        info: ModelInfo,
        device: torch.device,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        # oneDNN's convolutions are about twice as fast on channels-last memory.
        self._model = model.eval().to(memory_format=torch.channels_last)
        self.info = info
        self._device = device
        self._autocast_dtype = autocast_dtype
        self._may_compile = True

    def group_key(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The padded (height, width) in pixels: images with one key share a batch without
        changing each other's answer.
        """
        return self._model.transform.padded_size(image_size)

    def warm_up(self) -> None:
        """Run blank pictures through every part, so that the first request does not pay for first-time work.

        The engine `compiled` compiles nothing after that: in a batch it could take minutes, and pass for a device that
        hangs.
        """
        blank = Image(np.zeros((*WARM_UP_SIZE, 3), dtype=np.uint8))
        proposals = ((0.0, 0.0, 100.0, 100.0),) if self.info.needs_proposals else None
        query = Query(blank, DetectOptions(score_thresh=0.0, max_detections=1, proposals=proposals))
        self.predict([query])
        if self.info.engine == "compiled":
            self.predict([query] * 2)
            self._may_compile = False

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        """Detect objects in a batch of images, each by its own options.

        Args:
            queries: at least one image, all with the same `roi_op`; for answers that do not depend on batch mates,
                all of one `group_key`.

        Returns:
            One prediction for each query, in order.

        Raises:
            InferenceError: the network failed; OutOfMemoryError if for lack of memory.
            ValueError: their `roi_op` differ.
        """
        stage_seconds: dict[str, float] = {}
        images = [query.image for query in queries]
        roi_ops = {query.options.roi_op for query in queries}
        if len(roi_ops) > 1:
            raise ValueError(f"expected one roi_op for the whole batch, got {roi_ops}")
        try:
            with self._compiling_nothing(), self._autocast():
                found = self._model.detect(
                    [upload(torch.from_numpy(image.pixels), self._device) for image in images],
                    [self._selection(query.options) for query in queries],
                    with_masks=[query.options.with_masks for query in queries],
                    proposals=[self._proposals(query.options) for query in queries],
                    roi_op=roi_ops.pop(),
                    timed=self._timer(stage_seconds),
                )
        except (RuntimeError, MemoryError) as error:
            sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
            if is_out_of_memory(error):
                raise OutOfMemoryError(
                    f"{self.info.key} had not enough memory for a batch of {len(images)} ({sizes}): {error}"
                ) from error
            raise InferenceError(f"{self.info.key} failed on a batch of {len(images)} ({sizes}): {error}") from error
        padding_ratio = self._padding_ratio(images)
        return [
            Prediction(one, stage_seconds, batch_size=len(images), padding_ratio=padding_ratio)
            for one in _to_host(found)
        ]

    def release_memory(self) -> None:
        """Free what the device holds in reserve, after a lack of memory."""
        release_memory()

    def _selection(self, options: DetectOptions) -> Selection:
        info = self.info
        return Selection(
            score_thresh=info.score_thresh if options.score_thresh is None else options.score_thresh,
            detections_per_img=info.max_detections if options.max_detections is None else options.max_detections,
            labels=options.label_ids,
        )

    def _proposals(self, options: DetectOptions) -> torch.Tensor | None:
        if options.proposals is None:
            return None
        # In float64, which holds every number of JSON, until they are clipped.
        return torch.tensor(options.proposals, dtype=torch.float64).reshape(-1, 4)

    def _compiling_nothing(self) -> AbstractContextManager[object]:
        return nullcontext() if self._may_compile else torch.compiler.set_stance("eager_on_recompile")

    def _autocast(self) -> AbstractContextManager[object]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._autocast_dtype)

    def _timer(self, stage_seconds: dict[str, float]) -> StageTimer:
        @contextmanager
        def timed(stage: str) -> Iterator[None]:
            started = time.perf_counter()
            yield
            # On CUDA this is the time to launch a stage's work, not to finish it: waiting here would slow the device.
            # A stage may come twice: Fast R-CNN's search and its proposals are both `rpn`.
            stage_seconds[stage] = stage_seconds.get(stage, 0.0) + time.perf_counter() - started

        return timed

    def _padding_ratio(self, images: Sequence[Image]) -> float:
        resized = [self._model.transform.resized_size(image.size) for image in images]
        padded = [self.group_key(image.size) for image in images]
        height, width = max(size[0] for size in padded), max(size[1] for size in padded)
        return 1 - sum(h * w for h, w in resized) / (len(images) * height * width)


def _to_host(found: Sequence[ImageDetections]) -> list[Detections]:
    """All answers of a batch in one copy, for on CUDA each one waits for the device."""
    # float32 holds the labels exactly: there are far fewer than 2^24.
    columns = [
        values
        for one in found
        for values in (one.boxes, one.labels.to(one.boxes.dtype), one.scores, one.masks)
        if values is not None
    ]
    flat = torch.cat([values.flatten() for values in columns]).cpu().split([values.numel() for values in columns])
    copies = (values.view(column.shape).numpy() for values, column in zip(flat, columns, strict=True))
    return [
        Detections(
            boxes=next(copies),
            labels=next(copies).astype(np.int64),
            scores=next(copies),
            masks=None if one.masks is None else next(copies),
        )
        for one in found
    ]
