"""The data types that the rooms pass to each other: small data classes, mostly frozen, some of which check their shapes
when created. NumPy only, so that rooms that never import torch (`api`, `batching`) can use them.

Shapes: D detections of one image, M x M the mask head's output size, H x W the image. Boxes are (x1, y1, x2, y2).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from service.devices.device import Upload

Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]
UInt8Array = NDArray[np.uint8]
Box = tuple[float, float, float, float]
MaskFormat = Literal["rle", "polygons", "png", "crop", "none"]
RoboflowMasks = Literal["points", "rle", "none"]
MaskStyle = Literal["torchvision", "detectron2"]
"""Whose `paste_masks_in_image` decides which pixels a small mask covers."""
AnnotatorMasks = Literal["label_studio", "cvat"]
Intensity = Literal["full", "stretch"]
PictureType = Literal["image/png", "image/jpeg"]
ExtraName = Literal["class_scores"]
DrawnPart = Literal["boxes", "masks", "labels", "scores"]
ALL_EXTRAS: tuple[ExtraName, ...] = get_args(ExtraName)
ALL_DRAWN_PARTS: tuple[DrawnPart, ...] = get_args(DrawnPart)

# A rough figure for JPEG photographs; and the size to which networks resize large images.
_PIXELS_PER_BYTE = 8
_MOST_LIKELY_PIXELS = 1344 * 1344
# Networks enlarge small pictures, and part of the time does not depend on size. So a tiny picture must not count as
# next to nothing, or the first one would make the device look slow.
_LEAST_LIKELY_PIXELS = 250_000


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """A decoded picture, upright.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, C-contiguous.
        orientation_applied: whether EXIF orientation turned or mirrored the stored pixels.
        upload: the same pixels on their way to a device; None if they are not.
    """

    pixels: UInt8Array
    orientation_applied: bool = False
    upload: Upload | None = None

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or self.pixels.shape[2] != 3 or self.pixels.dtype != np.uint8:
            raise ValueError(f"expected (H, W, 3) uint8 pixels, got {self.pixels.shape} {self.pixels.dtype}")

    @property
    def height(self) -> int:
        """In pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """In pixels."""
        return int(self.pixels.shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width


@dataclass(frozen=True, slots=True)
class DetectOptions:
    """What one request asks of the model; None means the model's own default.

    Attributes:
        score_thresh: keep detections with a score above this, 0 to 1.
        max_detections: at most this many, best first, 1 to 1000.
        label_ids: keep only these classes (1-based; 0 is the background).
        with_masks: run the mask head (ignored by a model that has none).
        proposals: (x1, y1, x2, y2) each, finite, x1 < x2 and y1 < y2, in pixels of the image: classify and refine these
            instead of the RPN's. They may reach beyond the image, and are clipped to it.
        roi_op: the RoI operator of the box and the mask branch, one of the model's `roi_ops`.
        nms_thresh: IoU, 0 to 1, above which the better of two detections suppresses the other.
        class_agnostic_nms: whether it also suppresses detections of other classes.
        extras: further outputs for each detection, by name; see `Detections.extras`.
    """

    score_thresh: float | None = None
    max_detections: int | None = None
    label_ids: frozenset[int] | None = None
    with_masks: bool = True
    proposals: tuple[Box, ...] | None = None
    roi_op: str | None = None
    nms_thresh: float | None = None
    class_agnostic_nms: bool | None = None
    extras: tuple[ExtraName, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """One image and what is asked about it: the item that is batched."""

    image: Image
    options: DetectOptions = field(default_factory=DetectOptions)


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """What was found in one image, in the frame of `Image.pixels`, sorted by falling score.

    Attributes:
        boxes: (D, 4) float32 (x1, y1, x2, y2) in pixels, 0 <= x1 < x2 <= W.
        labels: (D,) int64 class ids, 1-based; 0, the background, never occurs.
        scores: (D,) float32, 0 to 1.
        masks: (D, M, M) float32 mask probabilities of the predicted class, spread over the box in the model's
            `mask_style`; None if not asked for.
        extras: further outputs for each detection that were asked for, by name: (D, ...) arrays. `class_scores` is
            (D, C) float32: the probability of each class, from 0, the background; each row's sum is 1.
    """

    boxes: Float32Array
    labels: Int64Array
    scores: Float32Array
    masks: Float32Array | None = None
    extras: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.boxes)
        if self.boxes.shape != (n, 4) or self.labels.shape != (n,) or self.scores.shape != (n,):
            raise ValueError(
                f"expected boxes (D, 4), labels (D,), scores (D,), "
                f"got {self.boxes.shape}, {self.labels.shape}, {self.scores.shape}"
            )
        if self.masks is not None and (self.masks.ndim != 3 or len(self.masks) != n):
            raise ValueError(f"expected masks ({n}, M, M), got {self.masks.shape}")
        for name, values in self.extras.items():
            if len(values) != n or name in ("boxes", "labels", "scores", "masks"):
                raise ValueError(f"expected extras of a name of their own and of length {n}, got {name} {values.shape}")

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, which: slice | Int64Array) -> Detections:
        """Some of the detections: every array indexed alike."""
        return Detections.of({name: values[which] for name, values in self.arrays().items()})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by name: `boxes`, `labels`, `scores`, `masks` if there are any, and the extras."""
        masks = {} if self.masks is None else {"masks": self.masks}
        return {"boxes": self.boxes, "labels": self.labels, "scores": self.scores, **masks, **self.extras}

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Detections:
        """The inverse of `arrays`."""
        own = {"boxes", "labels", "scores", "masks"}
        extras = {name: values for name, values in arrays.items() if name not in own}
        return cls(arrays["boxes"], arrays["labels"], arrays["scores"], arrays.get("masks"), extras)


@dataclass(frozen=True, slots=True, eq=False)
class PastedMask:
    """One object's pixels.

    Attributes:
        x, y: the rectangle's first pixel in the image.
        pixels: (height, width) of the smallest rectangle that holds the mask, 1 inside it and 0 around it; (0, 0) if
            the mask covers no pixel.
    """

    x: int
    y: int
    pixels: UInt8Array


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The model's answer for one image of a batch.

    Attributes:
        detections: what was found.
        stage_seconds: time of the whole batch by stage (`preprocess, backbone, rpn, roi_heads, postprocess`).
        batch_size: how many images shared the batch.
        padding_ratio: padded pixels / all pixels of the batch, 0 to 1.
        overflowed: whether the batch was rerun in float32, since its numbers overflowed half precision.
        uncompiled: whether a part of the network ran uncompiled, although the engine is `compiled`.
    """

    detections: Detections
    stage_seconds: Mapping[str, float]
    batch_size: int
    padding_ratio: float = 0.0
    overflowed: bool = False
    uncompiled: bool = False


NOT_FINITE = 1e9
"""Stands for a difference that is not finite, since JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class VerifiedValue:
    """How far one kind of output lies from that of the plain network.

    Attributes:
        difference: the largest of all values, in int8 their root mean square; for boxes in pixels of the pictures, for
            scores and masks as probabilities; `NOT_FINITE` if any number was not finite. For recordings the largest
            share of the detections that a replay finds otherwise than the work that was recorded.
        tolerance: the most that passes.
    """

    difference: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of comparing an engine, on its device and in its precision, with `eager` in float32 on the same
    device.

    Attributes:
        engine: the one that was verified; if it did not pass, another one serves.
        precision: the one that was verified.
        values: `boxes`, `scores`, `masks` if the network has them, and `recordings` if the engine makes some.
        seconds: how long the verification took.
    """

    engine: str
    precision: str
    values: Mapping[str, VerifiedValue]
    seconds: float

    @property
    def has_passed(self) -> bool:
        """Whether all differences are within their tolerance."""
        return all(one.difference <= one.tolerance for one in self.values.values())

    def __str__(self) -> str:
        return ", ".join(
            f"{name} within {one.difference:.2g} (of {one.tolerance:g})" for name, one in self.values.items()
        )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What callers may know of a loaded model.

    Attributes:
        labels: class names; `labels[i]` has the id i + 1.
        score_thresh: the default threshold, 0 to 1.
        max_detections: the default limit of detections per image.
        has_masks: whether it is a Mask R-CNN.
        roi_ops: RoI operators that can replace `roi_op`, itself included; empty if its heads fit no other.
        needs_proposals: whether every request must bring proposals.
        verification: of its engine and precision; None for `eager` in float32, which is the reference, and until the
            model has warmed up.
        mask_style: how its masks are spread over their boxes.
    """

    name: str
    version: int
    architecture: str
    backbone: str
    roi_op: str
    labels: tuple[str, ...]
    score_thresh: float
    max_detections: int
    has_masks: bool
    engine: str
    precision: str
    device: str
    roi_ops: tuple[str, ...] = ()
    needs_proposals: bool = False
    verification: Verification | None = None
    mask_style: MaskStyle = "torchvision"

    @property
    def key(self) -> str:
        """`name@version`, as requests may write it."""
        return f"{self.name}@{self.version}"


class Progress:
    """Which stage a request is in, and how long each earlier stage took. The rooms advance it; logs, metrics and
    answers read it.

    Attributes:
        batch_id: identifies the last batch that contained the image.
        stage: the current stage.
        stage_seconds: time in seconds by stage, for the stages that it has left.
        started_at: when it entered its first stage, in seconds of `time.monotonic`.
        trace_id: of the trace that it belongs to; None if it belongs to none.
    """

    def __init__(self, stage: str, *, trace_id: str | None = None) -> None:
        self.stage = stage
        self.trace_id = trace_id
        self.stage_seconds: dict[str, float] = {}
        self.batch_id = ""
        self.started_at = self._entered_at = time.monotonic()

    def enter(self, stage: str) -> None:
        """Leave the current stage for another one."""
        now = time.monotonic()
        self.stage_seconds[self.stage] = self.stage_seconds.get(self.stage, 0.0) + now - self._entered_at
        self.stage, self._entered_at = stage, now

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Enter within `at_risk`, while the thread only waits."""
        self._mark(None, -1)
        try:
            yield
        finally:
            self._mark(None, 1, at_once=True)

    def queued(self, padded_pixels: int) -> None:
        """The image now waits for the device, with so many resized and padded pixels."""

    def _mark(self, stage: str | None, change: int, *, at_once: bool = False) -> None:
        """One more thread, or one fewer, works on the request. Only worker processes report it.

        Args:
            at_once: whether this and all earlier marks must be known before the work begins.
        """


@contextmanager
def at_risk(requests: Sequence[Progress], stage: str) -> Iterator[None]:
    """Enter while this thread does work on requests that might kill the process.

    Enter it before the work looks at the first byte, so that a worker that dies has already reported the work. Several
    threads may work on one request.

    Args:
        stage: `decode`, `inference` or `encode`.
    """
    for progress in requests:
        progress._mark(stage, 1, at_once=progress is requests[-1])
    try:
        yield
    finally:
        for progress in requests:
            progress._mark(stage, -1)


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """An image as the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file.

    Attributes:
        intensity: how 16-bit grey becomes 8-bit: from its full range, or stretched between its own smallest and largest
            values, which 12-bit camera images in 16-bit files need.
    """

    data: bytes
    intensity: Intensity = "full"


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """An image that its sender has already decoded.

    Attributes:
        array: (H, W, 3) uint8 RGB, C-contiguous.
    """

    array: UInt8Array


Source = Encoded | Pixels


@dataclass(frozen=True, slots=True)
class Json:
    """An answer as our JSON, with masks in one of several formats, or in one from which `api` makes an annotation
    tool's regions.
    """

    masks: MaskFormat | AnnotatorMasks = "none"


@dataclass(frozen=True, slots=True)
class Drawing:
    """An answer as the image with the detections drawn into it.

    Attributes:
        type: media type of the picture.
        parts: what to draw; None for a choice that suits the image, see `imaging/overlay.py`.
    """

    type: PictureType = "image/png"
    parts: Sequence[DrawnPart] | None = None


@dataclass(frozen=True, slots=True)
class Tensors:
    """An answer as named arrays, see `answers/tensors.py`."""


@dataclass(frozen=True, slots=True)
class Coco:
    """An answer as COCO results, which `pycocotools` evaluates.

    Attributes:
        image_id: of the image, in the data set that it belongs to.
        with_masks: whether results have a segmentation.
        category_ids: the data set's category for each of the model's labels, in order; None for the label's own id.
    """

    image_id: int | str
    with_masks: bool = False
    category_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Roboflow:
    """An answer as the `predictions` of Roboflow's inference server, with masks as points or run lengths."""

    masks: RoboflowMasks = "none"


Form = Json | Drawing | Tensors | Coco | Roboflow


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Job:
    """One image, what to find in it, and the form of the answer.

    Attributes:
        model: the key of a loaded model, name@version.
        source: the image as it arrived.
        form: the form of the answer.
        deadline: when the caller stops waiting, in seconds of `time.monotonic`.
        is_bulk: whether it is one of many that may take their time.
        entries: most entries of the batcher, such as tiles, that are made of the image at a time. Each needs a place,
            so there must not be more than the detector's capacity.
    """

    model: str
    source: Source
    options: DetectOptions
    form: Form
    deadline: float
    progress: Progress
    is_bulk: bool = False
    entries: int = 1

    @property
    def likely_pixels(self) -> int:
        """Roughly how many pixels the network will see: a guess from what is known without decoding."""
        if isinstance(self.source, Pixels):
            pixels = self.source.array.size // 3
        else:
            pixels = _PIXELS_PER_BYTE * len(self.source.data)
        return min(max(_LEAST_LIKELY_PIXELS * self.entries, pixels), _MOST_LIKELY_PIXELS * self.entries)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The result of a job.

    Attributes:
        image_size: (height, width) of the upright image, the frame of the boxes.
        detections: how many there are.
        batch_size: how many images shared the batch.
        pieces: the detections in the form that the job asked for; a long answer arrives from a worker in pieces.
        batch_id: identifies the batch.
    """

    image_size: tuple[int, int]
    orientation_applied: bool
    detections: int
    batch_size: int
    pieces: Sequence[bytes]
    batch_id: str = ""

    @property
    def encoded(self) -> bytes:
        """All pieces together, which takes a copy."""
        return b"".join(self.pieces)

    @property
    def num_bytes(self) -> int:
        """The length of all pieces together."""
        return sum(map(len, self.pieces))
