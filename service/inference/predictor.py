"""`Predictor`: one network on one device. It takes decoded images and returns detections in their pixels. Not
thread-safe: one call at a time. Knows nothing of HTTP, queues or files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from service.devices import Clock, Device, device_of
from service.errors import InferenceError, ModelStoreError, OutOfMemoryError, first_line
from service.inference.engines.choosing import COMPILING, EAGER, Placed
from service.inference.engines.graphs import COUNTS, MOST_CHANGED, GraphedDetector
from service.inference.verification import SIZE, Reference, fixed_pictures
from service.modeling.generalized_rcnn import GeneralizedRCNN, ImageDetections
from service.modeling.roi_heads import Selection
from service.structures import Detections, DetectOptions, Image, ModelInfo, Prediction, Query, VerifiedValue

logger = logging.getLogger(__name__)

_WARM_UP_BATCHES = (1, 2, 8)
"""torch compiles anew for a batch of several pictures, and would for a large one if code for the small ones does not
hold for it. 8 is the default of `max_batch_size`.
"""


class Predictor:
    """One network on one device.

    Args:
        model: the network with its weights, on `device`.
        info: its public description, with the default thresholds.
        device: where the network is.
        placed: the engine that runs the network's parts.
        reference: the network's outputs are compared with this during warm-up; None to skip that.
        fallback: loads the replacement if this predictor fails its checks; None if failing is an error.
    """

    def __init__(
        self,
        model: GeneralizedRCNN,
        *,
        info: ModelInfo,
        device: torch.device,
        placed: Placed = EAGER,
        reference: Reference | None = None,
        fallback: Callable[[], Predictor] | None = None,
    ) -> None:
        # Convolutions are about twice as fast on channels-last memory.
        self._model = model.eval().to(memory_format=torch.channels_last)
        self.info = info
        self._device = device_of(device)
        self._placed = placed
        self._reference = reference
        self._has_warned = False
        self._fallback = fallback
        self._may_compile = True

    def group_key(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The padded (height, width) in pixels: images with one key share a batch without
        changing each other's answer.
        """
        return self._model.transform.padded_size(image_size)

    def begin_upload(self, image: Image) -> Image:
        """The image with its pixels on their way to the device, if copying takes time there. Any thread may call it."""
        upload = self._device.begin_upload(image.pixels)
        return image if upload is None else replace(image, upload=upload)

    def warm_up(self) -> None:
        """Run pictures through every part, so that the first request does not pay for one-time work, and compare the
        outputs with the reference.

        After this the engine `compiled` compiles nothing more: compiling during a batch could take minutes and look
        like a hung device.

        Raises:
            ModelStoreError: the network fails its checks, and there is no replacement.
            InferenceError: running the network failed.
        """
        try:
            self._run_warm_up_pictures()
            problem = self._verify() or self._placed.find_problem()
        except InferenceError as error:
            if self._fallback is None or isinstance(error, OutOfMemoryError):
                raise
            problem = first_line(error)
        if problem is None:
            self._reference = self._fallback = None
            return
        if self._fallback is None:
            raise ModelStoreError(f"{self.info.key}: {problem}")
        info, verification = self.info, self.info.verification
        self._become(self._fallback())
        fields = {"model": info.key, "engine": info.engine, "precision": info.precision, "reason": problem}
        logger.warning("another engine takes the place of one that does not do as it should", extra={"fields": fields})
        self.warm_up()
        if self.info.verification is None:
            self.info = replace(self.info, verification=verification)

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        """Detect objects in a batch of images, each with its own options.

        Args:
            queries: at least one image, all with the same `roi_op`; results are independent of the rest of the batch
                only if all share one `group_key`.

        Returns:
            One prediction for each query, in order.

        Raises:
            InferenceError: the network failed; OutOfMemoryError if it ran out of memory.
            ValueError: their `roi_op` differ.
        """
        images = [query.image for query in queries]
        roi_ops = {query.options.roi_op for query in queries}
        if len(roi_ops) > 1:
            raise ValueError(f"expected one roi_op for the whole batch, got {roi_ops}")
        try:
            with self._device.use(self.info.precision):
                return self._predict(queries)
        except (RuntimeError, MemoryError) as error:
            sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
            if self._device.is_out_of_memory(error):
                raise OutOfMemoryError(
                    f"{self.info.key} had not enough memory for a batch of {len(images)} ({sizes}): {error}"
                ) from error
            raise InferenceError(f"{self.info.key} failed on a batch of {len(images)} ({sizes}): {error}") from error

    def release_memory(self) -> None:
        """Free memory that the device holds in reserve; for use after running out of memory."""
        if self._placed.graphs is not None:
            self._placed.graphs.release()
        self._device.release_memory()

    def _run_warm_up_pictures(self) -> None:
        # Not square: code compiled for a square image would fit only squares.
        picture = Image(fixed_pictures()[0])
        proposals = ((0.0, 0.0, 100.0, 100.0),) if self.info.needs_proposals else None
        query = Query(picture, DetectOptions(score_thresh=0.0, max_detections=1, proposals=proposals))
        self.predict([query])
        if self.info.engine in COMPILING:
            for count in _WARM_UP_BATCHES[1:]:
                self.predict([query] * count)
            self._may_compile = False
        # Others may be named that no picture of this network needs.
        buckets = [size for size in self._model.transform.buckets if self.group_key(size) == size]
        for size in buckets:
            self.predict([replace(query, image=Image(np.zeros((*size, 3), np.uint8)))])
        if self._placed.graphs is not None:
            self._record_batches(self._placed.graphs, buckets)

    def _record_batches(self, graphs: GraphedDetector, buckets: Sequence[tuple[int, int]]) -> None:
        """Record batches of every bucket; if there are none, those of the fixed pictures, so that some are verified."""
        with self._device.use(self.info.precision), self._compiling_nothing():
            graphs.record(
                buckets or [self.group_key(SIZE)],
                counts=COUNTS if buckets else (1, 2),
                with_masks=(True, False) if self.info.has_masks else (False,),
                pictures=[self._device.upload(torch.from_numpy(one)) for one in fixed_pictures()],
            )

    def _verify(self) -> str | None:
        """Compare the network with its reference. Returns what is wrong, or None if it passes."""
        if self._reference is None:
            return None
        info, placed = self.info, self._placed
        with self._compiling_nothing():
            verification = self._reference.hold(self._model, engine=info.engine, precision=info.precision)
        if placed.half is not None:
            placed.half.take_check()
        if placed.graphs is not None:
            recordings = VerifiedValue(difference=placed.graphs.largest_change, tolerance=MOST_CHANGED)
            verification = replace(verification, values={**verification.values, "recordings": recordings})
        placed.take_uncompiled()
        self.info = replace(info, verification=verification)
        logger.info(
            "model verified" if verification.has_passed else "model does not pass its verification",
            extra={"fields": {"model": info.key, "engine": info.engine, "differences": str(verification)}},
        )
        if verification.has_passed:
            return None
        return f"engine {info.engine!r} in {info.precision} differs from eager in float32: {verification}"

    def _become(self, other: Predictor) -> None:
        """Take over another predictor's state; the current network is dropped."""
        vars(self).update(vars(other))

    def _predict(self, queries: Sequence[Query]) -> list[Prediction]:
        images = [query.image for query in queries]
        clock, half = self._device.clock(), self._placed.half
        uploaded = [self._on_device(image) for image in images]

        def detect(model: GeneralizedRCNN) -> list[ImageDetections]:
            return model.detect(
                uploaded,
                [self._selection(query.options) for query in queries],
                with_masks=[query.options.with_masks for query in queries],
                proposals=[self._proposals(query.options) for query in queries],
                roi_op=queries[0].options.roi_op,
                timed=clock.stage,
            )

        with self._compiling_nothing():
            replayed = self._replay(queries, uploaded, clock)
            if replayed is not None:
                detections, overflowed = replayed
            else:
                found = detect(self._model)
                detections, overflowed = _to_host(found, self._device, None if half is None else half.take_check())
        if overflowed:
            assert half is not None
            detections, _ = _to_host(detect(half.in_float32()), self._device)
        stage_seconds, padding_ratio = clock.seconds(), self._padding_ratio(images)
        uncompiled = self._note_uncompiled(images)
        return [
            Prediction(
                one,
                stage_seconds,
                batch_size=len(images),
                padding_ratio=padding_ratio,
                overflowed=overflowed,
                uncompiled=uncompiled,
            )
            for one in detections
        ]

    def _on_device(self, image: Image) -> Tensor:
        """(H, W, 3) uint8."""
        copied = None if image.upload is None else image.upload.take()
        return self._device.upload(torch.from_numpy(image.pixels)) if copied is None else copied

    def _replay(
        self, queries: Sequence[Query], uploaded: Sequence[Tensor], clock: Clock
    ) -> tuple[list[Detections], bool] | None:
        """The detections from a recorded batch, and whether half precision overflowed; None if none is recorded for
        these queries.
        """
        # Code has to be compiled before it is recorded.
        graphs = self._placed.graphs
        if graphs is None or self._may_compile:
            return None
        if any(one.options.roi_op is not None or one.options.proposals is not None for one in queries):
            return None
        with clock.stage("graph"):
            replayed = graphs.detect(
                uploaded,
                [self._selection(query.options) for query in queries],
                with_masks=[query.options.with_masks and self.info.has_masks for query in queries],
            )
        if replayed is None:
            return None
        detections, is_finite = replayed
        return detections, not is_finite

    def _note_uncompiled(self, images: Sequence[Image]) -> bool:
        """Whether parts of this batch ran uncompiled although the engine is `compiled`; logged once."""
        parts = self._placed.take_uncompiled()
        if parts and not self._has_warned:
            self._has_warned = True
            sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
            fields = {"model": self.info.key, "parts": ", ".join(parts), "batch_size": len(images), "sizes": sizes}
            logger.warning("a batch fits no compiled code and ran without it, slower", extra={"fields": fields})
        return bool(parts)

    def _selection(self, options: DetectOptions) -> Selection:
        info = self.info
        return Selection(
            score_thresh=info.score_thresh if options.score_thresh is None else options.score_thresh,
            detections_per_img=info.max_detections if options.max_detections is None else options.max_detections,
            labels=options.label_ids,
            nms_thresh=options.nms_thresh,
            class_agnostic_nms=options.class_agnostic_nms,
            with_class_scores="class_scores" in options.extras,
        )

    def _proposals(self, options: DetectOptions) -> Tensor | None:
        if options.proposals is None:
            return None
        # In float64, which holds every JSON number, until they are clipped.
        return torch.tensor(options.proposals, dtype=torch.float64).reshape(-1, 4)

    def _compiling_nothing(self) -> AbstractContextManager[object]:
        return nullcontext() if self._may_compile else torch.compiler.set_stance("eager_on_recompile")

    def _padding_ratio(self, images: Sequence[Image]) -> float:
        resized = [self._model.transform.resized_size(image.size) for image in images]
        padded = [self.group_key(image.size) for image in images]
        height, width = max(size[0] for size in padded), max(size[1] for size in padded)
        return 1 - sum(h * w for h, w in resized) / (len(images) * height * width)


def _to_host(
    found: Sequence[ImageDetections], device: Device, is_finite: Tensor | None = None
) -> tuple[list[Detections], bool]:
    """Copy all results of a batch to the host at once: on CUDA every copy waits for the device.

    Args:
        found: the detections in each image.
        device: where they are.
        is_finite: () float32, 0 if the network computed infinities or NaN; it travels in the same copy.

    Returns:
        The detections, and whether the network computed infinities or NaN.
    """
    # float32 holds the labels exactly: there are far fewer than 2^24.
    columns = [
        values
        for one in found
        for values in (one.boxes, one.labels.to(one.boxes.dtype), one.scores, one.masks, *one.extras.values())
        if values is not None
    ]
    if is_finite is not None:
        columns.append(is_finite)
    flat = device.download(torch.cat([values.flatten() for values in columns]))
    parts = flat.split([values.numel() for values in columns])
    copies = iter([values.view(column.shape).numpy() for values, column in zip(parts, columns, strict=True)])
    detections = [
        Detections(
            boxes=next(copies),
            labels=next(copies).astype(np.int64),
            scores=next(copies),
            masks=None if one.masks is None else next(copies),
            extras={name: next(copies) for name in one.extras},
        )
        for one in found
    ]
    return detections, is_finite is not None and not next(copies)
