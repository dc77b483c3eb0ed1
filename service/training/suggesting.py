"""A network's configuration fitted to a data set: the scale at which its objects are large enough, anchors of their
sizes and shapes, and limits that suit its fullest picture.

Shapes: K objects of the whole set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.errors import DatasetError
from service.model_store.toml_writer import write_toml
from service.modeling.config import ModelConfig
from service.training.dataset import CocoDataset

NUM_LEVELS = 5
_SMALLEST_MEDIAN = 32.0
"""Minimum side of the median object, in pixels of the resized picture: a pyramid's finest map has stride 4."""
_SMALLEST_TENTH = 16.0
"""… and the minimum side that nine of ten objects should exceed."""
_LARGEST_SCALE = 3.0
_MIN_SIZES = (256, 1024)
_MAX_DETECTIONS = 1000
# Anchors closer in size propose the same boxes twice.
_LEAST_RATIO_OF_SIZES = 1.25


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A configuration that fits the data.

    Attributes:
        median_side: of the objects, in pixels of the original pictures.
        scale: factor from those pixels to the pixels of `anchors.sizes`.
        matched: the share of objects that an anchor of some level would overlap by half if centred on them.
        fullest: number of objects in the fullest picture.
    """

    document: dict[str, object]
    median_side: float
    scale: float
    matched: float
    fullest: int

    def words(self) -> str:
        """The reasons in one line."""
        return (
            f"the median side of objects is {self.median_side:.0f} pixels, {self.median_side * self.scale:.0f} after "
            f"resizing; anchors overlap {100 * self.matched:.0f} % of them by half or more; the fullest picture has "
            f"{self.fullest} objects"
        )


def suggest(dataset: CocoDataset) -> Suggestion:
    """A small network to train from scratch, with the data-dependent settings fitted to the data set.

    Raises:
        DatasetError: there are no objects.
    """
    sizes = np.array([sample.image_size for sample in dataset.samples], dtype=np.float64)
    sides = [sample.boxes[:, 2:] - sample.boxes[:, :2] for sample in dataset.samples]
    if not sum(map(len, sides)):
        raise DatasetError(f"{dataset.path}: expected objects to fit a network to, got none")
    min_size, max_size = _transform(sizes, np.concatenate(sides).astype(np.float64))
    scales = np.minimum(min_size / sizes.min(axis=1), max_size / sizes.max(axis=1))
    resized = np.concatenate([own * scale for own, scale in zip(sides, scales, strict=True)]).astype(np.float64)
    anchor_sides = _anchor_sides(np.sqrt(resized.prod(axis=1)))
    ratios = _ratios(resized)
    fullest = max(map(len, sides))
    limit = min(_MAX_DETECTIONS, max(100, math.ceil(1.5 * fullest / 10) * 10))
    document: dict[str, object] = {
        "architecture": "mask_rcnn" if dataset.has_masks else "faster_rcnn",
        "labels": list(dataset.labels),
        "backbone": {"name": "narrow_resnet18_fpn", "width": 32, "out_channels": 64, "norm": "batch_norm"},
        "transform": {"min_size": min_size, "max_size": max_size},
        "anchors": {"sizes": [[side] for side in anchor_sides], "aspect_ratios": ratios},
        "rpn": {
            "pre_nms_top_n_train": 1000,
            "post_nms_top_n_train": 1000,
            "pre_nms_top_n_test": max(1000, 4 * limit),
            "post_nms_top_n_test": max(1000, 2 * limit),
        },
        "roi": {
            "box_head_channels": 512,
            "batch_size_per_image": 128,
            "positive_fraction": 0.33,
            **({"mask_head_channels": [64, 64, 64, 64]} if dataset.has_masks else {}),
        },
        "detections": {"detections_per_img": limit},
    }
    ModelConfig.model_validate(document)
    return Suggestion(
        document,
        median_side=float(np.median(np.sqrt(np.concatenate(sides).prod(axis=1)))),
        scale=float(np.median(scales)),
        matched=_matched(resized, anchor_sides, ratios),
        fullest=fullest,
    )


def suggestion_text(suggestion: Suggestion, *, source: str) -> str:
    """The `model.toml`, preceded by the reasons as comments."""
    reasons = [
        f"# Fitted to {source} by `roiserve train --suggest`:",
        *(f"# {one}." for one in suggestion.words().split("; ")),
    ]
    return "\n".join([*reasons, "", write_toml(suggestion.document)])


def _transform(image_sizes: NDArray[np.float64], sides: NDArray[np.float64]) -> tuple[int, int]:
    """`min_size` and `max_size`: as large as the objects need, but not below the size of small pictures."""
    lengths = np.sqrt(sides.prod(axis=1))
    wanted = max(_SMALLEST_MEDIAN / np.median(lengths), _SMALLEST_TENTH / np.quantile(lengths, 0.1))
    short = float(np.median(image_sizes.min(axis=1)))
    least, most = _MIN_SIZES
    min_size = max(short * min(wanted, _LARGEST_SCALE), min(short, 512.0))
    min_size = 32 * round(min(max(min_size, least), most) / 32)
    ratio = float(np.quantile(image_sizes.max(axis=1) / image_sizes.min(axis=1), 0.95))
    return min_size, 32 * math.ceil(min_size * min(ratio, 2.5) / 32)


def _anchor_sides(sides: NDArray[np.float64]) -> list[int]:
    """k-means on the logarithms of the objects' sides, starting from their quantiles; one side per level."""
    logarithms = np.log(np.maximum(sides, 1.0))
    centres = np.quantile(logarithms, (np.arange(NUM_LEVELS) + 0.5) / NUM_LEVELS)
    for _ in range(50):
        nearest = np.abs(logarithms[:, None] - centres[None]).argmin(axis=1)
        moved = np.array(
            [logarithms[nearest == k].mean() if (nearest == k).any() else centres[k] for k in range(NUM_LEVELS)]
        )
        if np.allclose(moved, centres):
            break
        centres = moved
    # If all objects have one size, they need one anchor; the others are spread around it.
    centres = np.sort(centres)
    middle, gap = NUM_LEVELS // 2, math.log(_LEAST_RATIO_OF_SIZES)
    for k in range(middle + 1, NUM_LEVELS):
        centres[k] = max(centres[k], centres[k - 1] + gap)
    for k in reversed(range(middle)):
        centres[k] = min(centres[k], centres[k + 1] - gap)
    whole = [max(4, round(math.exp(centre))) for centre in centres]
    return [max(side, 4 + place) for place, side in enumerate(whole)]


def _ratios(sides: NDArray[np.float64]) -> list[float]:
    """Height / width, symmetric, because training rotates pictures by multiples of 90 degrees."""
    spread = float(np.exp(np.quantile(np.abs(np.log(sides[:, 1] / sides[:, 0])), 0.8)))
    return [1.0] if spread < 1.25 else [round(1 / spread, 2), 1.0, round(spread, 2)]


def _matched(sides: NDArray[np.float64], anchor_sides: list[int], ratios: list[float]) -> float:
    widths = np.array([side / math.sqrt(ratio) for side in anchor_sides for ratio in ratios])
    heights = np.array([side * math.sqrt(ratio) for side in anchor_sides for ratio in ratios])
    common = np.minimum(sides[:, :1], widths) * np.minimum(sides[:, 1:], heights)
    union = sides.prod(axis=1)[:, None] + widths * heights - common
    return float(((common / union).max(axis=1) >= 0.5).mean())
