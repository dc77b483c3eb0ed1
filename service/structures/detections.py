"""What is asked of one image and what was found in it. Some of these check their shapes when created.

Shapes: D detections of one image, M x M the mask head's output size, H x W the image. Boxes are (x1, y1, x2, y2).
"""

from __future__ import annotations

from collections.abc import Mapping
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
ExtraName = Literal["class_scores"]
ALL_EXTRAS: tuple[ExtraName, ...] = get_args(ExtraName)


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
