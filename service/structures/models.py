"""What callers may know of a loaded model, and how far its engine's outputs are from the plain network's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MaskStyle = Literal["torchvision", "detectron2"]
"""Whose `paste_masks_in_image` decides which pixels a small mask covers."""

NOT_FINITE = 1e9
"""Stands for a difference that is not finite, since JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class VerifiedValue:
    """How far one kind of output is from that of the plain network.

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
