"""The `graphs` engine: a whole batch, from the network's input to the packed answer, recorded once and replayed
(`service/modeling/fixed_sizes.py`). Launching some hundred kernels one by one takes longer than running them for a few
pictures.

A recording holds for one padded size and one number of pictures. A batch is filled up to the next recorded number with
blank pictures. What no recording holds for takes the usual path.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.devices import Device
from service.devices.device import Recording
from service.errors import first_line
from service.modeling.fixed_sizes import CANDIDATES, FixedDetections, Wanted, detect_fixed
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.poolers import RoIPooler
from service.modeling.roi_heads import Selection
from service.structures import Detections, Float32Array

logger = logging.getLogger(__name__)

_COUNTS = (1, 2, 4, 8)
"""Numbers of pictures that are recorded."""
_MOST_RECORDINGS = 96
"""All that the most buckets take (11 sizes, 4 counts, with and without masks: 88), and a few. They share their working
memory, but each keeps its results and its list of kernels, some MB.
"""

Key = tuple[tuple[int, int], int, bool]
"""Padded (height, width), number of pictures, with masks."""


@dataclass(frozen=True, slots=True, eq=False)
class _Recorded:
    """A recording, its inputs, and which detections its output holds."""

    recording: Recording
    batch: Tensor
    wanted: Tensor


class GraphedDetector:
    """Records and replays the batches of one network.

    Args:
        model: with an RPN, its parts in place, on its device.
        device: where it is; must be able to record.
        num_classes: with the background.
        max_detections: the most detections of an image; requests for more take the usual path.
        take_check: see `HalfNetwork.take_check`; None in float32.
        capacity: candidates of an image; an image with more takes the usual path.
    """

    def __init__(
        self,
        model: GeneralizedRCNN,
        *,
        device: Device,
        num_classes: int,
        max_detections: int,
        take_check: Callable[[], Tensor] | None = None,
        capacity: int = CANDIDATES,
    ) -> None:
        self._model = model
        self._device = device
        self._num_classes = num_classes
        self._max_detections = max_detections
        self._take_check = take_check
        self._capacity = capacity
        self._seen: Counter[Key] = Counter()
        self._recorded: dict[Key, _Recorded] = {}
        self._memory: Tensor | None = None

    def record(self, sizes: Sequence[tuple[int, int]], *, with_masks: Sequence[bool]) -> None:
        """Record batches of these padded sizes, each with masks, without, or both. The largest come first, so that the
        others fit into their memory.
        """
        keys = [(size, count, masks) for size in sizes for count in _COUNTS for masks in with_masks]
        for key in sorted(keys, key=lambda key: (math.prod(key[0]) * key[1], key[2]), reverse=True):
            self._record(key)

    @torch.inference_mode()
    def detect(
        self, images: Sequence[Tensor], selections: Sequence[Selection], *, with_masks: Sequence[bool]
    ) -> tuple[list[Detections], bool] | None:
        """Detect objects in a batch.

        Args:
            images: (H, W, 3) uint8 RGB each, on the device.
            selections: which detections each image keeps.
            with_masks: whether to return each image's masks.

        Returns:
            The detections in each image, and whether the network's outputs were finite. None if no recording holds for
            this batch. The first batch of a kind is not recorded, the second is.
        """
        recorded = self._recorded_for(images, selections, any(with_masks))
        if recorded is None:
            return None
        prepared = self._model.transform.prepare(images)
        wanted = Wanted.of(
            selections,
            heads=self._model.roi_heads,
            num_classes=self._num_classes,
            resized=prepared.image_sizes,
            original=[(image.shape[0], image.shape[1]) for image in images],
        )
        count = len(images)
        recorded.batch[:count].copy_(prepared.tensors)
        recorded.batch[count:].zero_()
        recorded.wanted[:count].copy_(self._device.upload(wanted.table))
        # Of blank pictures no class is wanted.
        recorded.wanted[count:].zero_()
        recorded.recording.replay()
        rows: Float32Array = recorded.recording.output[:count].cpu().numpy()
        return _unpacked(rows, self._max_detections, with_masks)

    def release(self) -> None:
        """Drop all recordings and their memory."""
        for one in self._recorded.values():
            one.recording.release()
        self._recorded.clear()
        self._seen.clear()
        self._memory = None

    def _recorded_for(
        self, images: Sequence[Tensor], selections: Sequence[Selection], with_masks: bool
    ) -> _Recorded | None:
        count = next((one for one in _COUNTS if one >= len(images)), None)
        if count is None or any(one.detections_per_img > self._max_detections for one in selections):
            return None
        padded = [self._model.transform.padded_size((one.shape[0], one.shape[1])) for one in images]
        key = ((max(height for height, _ in padded), max(width for _, width in padded)), count, with_masks)
        self._seen[key] += 1
        if self._seen[key] == 2:
            self._record(key)
        return self._recorded.get(key)

    @torch.inference_mode()
    def _record(self, key: Key) -> None:
        (height, width), count, with_masks = key
        channels = self._model.transform.num_channels
        if key in self._recorded or len(self._recorded) == _MOST_RECORDINGS:
            return
        memory, needed = self._input_memory(), count * height * width * channels
        if needed > len(memory):
            return
        # In channels-last order.
        batch = memory[:needed].view(count, height, width, channels).permute(0, 3, 1, 2)
        wanted = torch.zeros(count, 10 + self._num_classes, device=self._device.torch_device)

        def run() -> Tensor:
            found = detect_fixed(
                self._model,
                batch,
                Wanted(wanted),
                capacity=self._capacity,
                max_detections=self._max_detections,
                with_masks=with_masks,
            )
            return _packed(found, None if self._take_check is None else self._take_check())

        try:
            self._recorded[key] = _Recorded(self._device.record(run), batch, wanted)
        except RuntimeError as error:
            fields = {"size": f"{width}x{height}", "batch_size": count, "reason": first_line(error)}
            logger.warning("a batch cannot be recorded; such batches take the usual path", extra={"fields": fields})

    def _input_memory(self) -> Tensor:
        """Room for the largest batch; all recordings read the front of it."""
        if self._memory is None:
            numbers = _COUNTS[-1] * self._model.transform.most_pixels * self._model.transform.num_channels
            self._memory = torch.zeros(numbers, device=self._device.torch_device)
        return self._memory


def why_not_recorded(model: GeneralizedRCNN, device: Device) -> str | None:
    """Why the engine `graphs` cannot run a network here; None if it can."""
    if not device.can_record:
        return f"engine 'graphs' runs on CUDA, not on {device.label}"
    pooler = model.roi_heads.box_roi_pool
    if not model.has_rpn or not isinstance(pooler, RoIPooler) or pooler.roi.op != "roi_align":
        return "engine 'graphs' runs networks with an RPN and RoI Align"
    if device.kernels is None:
        return "engine 'graphs' needs Triton, which does not work here"
    return None


def _packed(found: FixedDetections, is_finite: Tensor | None) -> Tensor:
    """(N, ...) float32, all of each image in one row, so that one copy brings it to the host."""
    finite = found.scores.new_ones(()) if is_finite is None else is_finite
    columns = [
        found.counts.unsqueeze(1).float(),
        found.fit.unsqueeze(1).float(),
        finite.expand(len(found.counts), 1),
        found.boxes.flatten(start_dim=1),
        found.labels.float(),
        found.scores,
    ]
    return torch.cat(columns if found.masks is None else [*columns, found.masks.flatten(start_dim=1)], dim=1)


def _unpacked(
    rows: Float32Array, max_detections: int, with_masks: Sequence[bool]
) -> tuple[list[Detections], bool] | None:
    """Undo `_packed`; None if an image does not fit."""
    if not rows[:, 1].all():
        return None
    most = max_detections
    boxes, labels, scores, masks = np.split(rows[:, 3:], [4 * most, 5 * most, 6 * most], axis=1)
    side = math.isqrt(masks.shape[1] // most)
    detections = [
        Detections(
            boxes=boxes[index].reshape(most, 4)[:count],
            labels=labels[index, :count].astype(np.int64),
            scores=scores[index, :count],
            masks=masks[index].reshape(most, side, side)[:count] if wanted else None,
        )
        for index, (count, wanted) in enumerate(zip(rows[:, 0].astype(int), with_masks, strict=True))
    ]
    return detections, bool(rows[:, 2].all())
