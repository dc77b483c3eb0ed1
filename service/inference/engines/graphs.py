"""The `graphs` engine: a whole batch, from the network's input to the packed answer, recorded once and replayed
(`service/modeling/fixed_sizes.py`). Launching some hundred kernels one by one takes longer than running them for a few
pictures.

A recording holds for one padded size and one number of pictures. A batch is filled up to the next recorded number with
blank pictures. What no recording holds for takes the usual path. Each recording is replayed once when it is made, and
what it finds is compared with what the recorded work found.
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
from torch.nn import functional

from service.devices import Device
from service.devices.device import Recorder, Recording
from service.errors import first_line
from service.modeling.fixed_sizes import CANDIDATES, FixedDetections, Wanted, detect_fixed
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.poolers import RoIPooler
from service.modeling.roi_heads import Selection
from service.structures import Detections, Float32Array

logger = logging.getLogger(__name__)

COUNTS = (1, 2, 4, 8)
"""Numbers of pictures that are recorded."""
_MOST_RECORDINGS = 96
"""All that the most buckets take (11 sizes, 4 counts, with and without masks: 88), and a few. They share their working
memory, but each keeps its results and its list of kernels, some MB.
"""

Key = tuple[tuple[int, int], int, bool]
"""Padded (height, width), number of pictures, with masks."""


MOST_CHANGED = 0.1
"""The share of the detections that a replay may find otherwise. The same kernels on the same numbers should find the
same, but no library promises it, and a rounding may decide which of two boxes is suppressed.
"""
_ALIKE_PIXELS, _ALIKE_PROBABILITY = 1.0, 0.03


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """What a recording reads: (N, C, H, W) and see `Wanted`."""

    batch: Tensor
    wanted: Tensor

    def fill(self, batch: Tensor, wanted: Tensor) -> None:
        """With the pictures of a batch, and blank ones, of which no class is wanted."""
        for ours, given in ((self.batch, batch), (self.wanted, wanted)):
            ours[: len(given)].copy_(given)
            ours[len(given) :].zero_()


@dataclass(frozen=True, slots=True, eq=False)
class _Recorded:
    """A recording, its inputs, and what else it reads."""

    recording: Recording
    inputs: _Inputs
    was_read: Sequence[Tensor]


class GraphedDetector:
    """Records and replays the batches of one network.

    Args:
        model: with an RPN, its parts in place, on its device.
        device: where it is; must be able to record.
        take_check: see `HalfNetwork.take_check`; None in float32.
        capacity: candidates of an image; an image with more takes the usual path.

    Attributes:
        problem: why nothing is recorded any more; None if nothing failed.
        largest_change: of all recordings that were made, the largest share of the detections that the replay found
            otherwise.
    """

    def __init__(
        self,
        model: GeneralizedRCNN,
        *,
        device: Device,
        take_check: Callable[[], Tensor] | None = None,
        capacity: int = CANDIDATES,
    ) -> None:
        self._model = model
        self._device = device
        # Requests for more take the usual path.
        self._max_detections: int = model.roi_heads.detections_per_img
        self._take_check = take_check
        self._capacity = capacity
        self._seen: Counter[Key] = Counter()
        self._recorded: dict[Key, _Recorded] = {}
        self._recorder: Recorder | None = None
        self._memory: Tensor | None = None
        self.problem: str | None = None
        self.largest_change = 0.0

    @torch.inference_mode()
    def record(
        self,
        sizes: Sequence[tuple[int, int]],
        *,
        pictures: Sequence[Tensor],
        with_masks: Sequence[bool],
        counts: Sequence[int] = COUNTS,
    ) -> None:
        """Record batches of these padded sizes and numbers of pictures, each with masks, without, or both. The largest
        come first, so that the others fit into their memory.

        Args:
            pictures: (H, W, 3) uint8 RGB each, on the device: what the batches show.
        """
        shown = self._model.transform.prepare(pictures).tensors
        keys = [(size, count, masks) for size in sizes for count in counts for masks in with_masks]
        for size, count, masks in sorted(keys, key=lambda key: (math.prod(key[0]) * key[1], key[2]), reverse=True):
            batch = functional.interpolate(shown, size).repeat(-(-count // len(shown)), 1, 1, 1)[:count]
            everything = Wanted.of(
                [Selection(0.0, self._max_detections)] * count,
                heads=self._model.roi_heads,
                resized=[size] * count,
                original=[size] * count,
            )
            self._record((size, count, masks), batch, self._device.upload(everything.table))

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
        key = self._key(images, selections, any(with_masks))
        if key is None or (key not in self._recorded and self._seen[key] != 2):
            return None
        prepared = self._model.transform.prepare(images)
        wanted = Wanted.of(
            selections,
            heads=self._model.roi_heads,
            resized=prepared.image_sizes,
            original=[(image.shape[0], image.shape[1]) for image in images],
        )
        table = self._device.upload(wanted.table)
        if key not in self._recorded:
            self._record(key, prepared.tensors, table)
        recorded = self._recorded.get(key)
        if recorded is None:
            return None
        recorded.inputs.fill(prepared.tensors, table)
        recorded.recording.replay()
        rows: Float32Array = self._device.download(recorded.recording.output[: len(images)]).numpy()
        return _unpacked(rows, self._max_detections, with_masks) if rows[:, 1].all() else None

    def release(self) -> None:
        """Drop all recordings and their memory."""
        if self._recorder is not None:
            self._recorder.release()
        self._recorder = None
        self._recorded.clear()
        self._seen.clear()
        self._memory = None

    def _key(self, images: Sequence[Tensor], selections: Sequence[Selection], with_masks: bool) -> Key | None:
        """What a recording of this batch holds for; None if there can be none."""
        count = next((one for one in COUNTS if one >= len(images)), None)
        if count is None or any(one.detections_per_img > self._max_detections for one in selections):
            return None
        padded = [self._model.transform.padded_size((one.shape[0], one.shape[1])) for one in images]
        key = ((max(height for height, _ in padded), max(width for _, width in padded)), count, with_masks)
        self._seen[key] += 1
        return key

    def _record(self, key: Key, batch: Tensor, wanted: Tensor) -> None:
        """Record batches like this one, unless that failed before or there is no room."""
        if self.problem is not None or key in self._recorded or len(self._recorded) == _MOST_RECORDINGS:
            return
        inputs = self._inputs(key)
        if inputs is None:
            return
        inputs.fill(batch, wanted)
        was_read: list[Tensor] = []

        def run() -> Tensor:
            found = detect_fixed(
                self._model,
                inputs.batch,
                Wanted(inputs.wanted),
                capacity=self._capacity,
                max_detections=self._max_detections,
                with_masks=key[2],
            )
            was_read.extend(found.was_read)
            return _packed(found, None if self._take_check is None else self._take_check())

        try:
            self._recorder = self._recorder or self._device.recorder()
            recording = self._recorder.record(run)
            self._check(recording, run())
        except RuntimeError as error:
            # A capture that fails may leave PyTorch's allocator in a state in which it frees nothing more
            # (pytorch/pytorch#180395), so this is tried no further.
            (height, width), count, _ = key
            self.problem = first_line(error)
            fields = {"size": f"{width}x{height}", "batch_size": count, "reason": self.problem}
            logger.warning("a batch cannot be recorded; new kinds take the usual path", extra={"fields": fields})
        else:
            self._recorded[key] = _Recorded(recording, inputs, was_read)

    def _check(self, recording: Recording, expected: Tensor) -> None:
        """Compare a replay with what the recorded work itself gives."""
        recording.replay()
        replayed, computed = (
            _unpacked(rows.cpu().numpy(), self._max_detections, [True] * len(rows))[0]
            for rows in (recording.output, expected)
        )
        change = max(_changed(ours, theirs) for ours, theirs in zip(replayed, computed, strict=True))
        self.largest_change = max(self.largest_change, change)
        if change > MOST_CHANGED:
            raise RuntimeError(f"its replay finds {change:.0%} of the objects otherwise")

    def _inputs(self, key: Key) -> _Inputs | None:
        """The memory that a recording reads: all share the front of that for the largest batch. None if it is more."""
        (height, width), count, _ = key
        channels = self._model.transform.num_channels
        if self._memory is None:
            numbers = COUNTS[-1] * self._model.transform.most_pixels * channels
            self._memory = torch.zeros(numbers, device=self._device.torch_device)
        needed = count * height * width * channels
        if needed > len(self._memory):
            return None
        # In channels-last order.
        batch = self._memory[:needed].view(count, height, width, channels).permute(0, 3, 1, 2)
        return _Inputs(
            batch, torch.zeros(count, 10 + self._model.roi_heads.num_classes, device=self._device.torch_device)
        )


def _changed(found: Detections, expected: Detections) -> float:
    """The share of the detections that have none like them in the other: of the same label, and with nearly the same
    score, box and mask.
    """
    if not len(found) or not len(expected):
        return float(len(found) != len(expected))
    alike = (found.labels[:, None] == expected.labels) & (
        np.abs(found.scores[:, None] - expected.scores) <= _ALIKE_PROBABILITY
    )
    alike &= np.abs(found.boxes[:, None] - expected.boxes).max(axis=2) <= _ALIKE_PIXELS
    if found.masks is not None and expected.masks is not None:
        for ours, theirs in np.argwhere(alike):
            alike[ours, theirs] = np.abs(found.masks[ours] - expected.masks[theirs]).mean() <= _ALIKE_PROBABILITY
    return 1 - float(min(alike.any(axis=1).mean(), alike.any(axis=0).mean()))


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


def _unpacked(rows: Float32Array, max_detections: int, with_masks: Sequence[bool]) -> tuple[list[Detections], bool]:
    """Undo `_packed`: the detections in each image, and whether the network's outputs were finite."""
    most = max_detections
    boxes, labels, scores, masks = np.split(rows[:, 3:], [4 * most, 5 * most, 6 * most], axis=1)
    side = math.isqrt(masks.shape[1] // most)
    detections = [
        Detections(
            boxes=boxes[index].reshape(most, 4)[:count],
            labels=labels[index, :count].astype(np.int64),
            scores=scores[index, :count],
            masks=masks[index].reshape(most, side, side)[:count] if wanted and side else None,
        )
        for index, (count, wanted) in enumerate(zip(rows[:, 0].astype(int), with_masks, strict=True))
    ]
    return detections, bool(rows[:, 2].all())
