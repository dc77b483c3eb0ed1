"""Encodes detections as a prediction of Label Studio: a region for each object in every tag that takes it."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import ArrayLike, NDArray

from service.answers.array import ArrayEncoder, Outlines
from service.structures import Detections, Float32Array, Image, LabelStudio, MaskFormat, ModelInfo, RegionType

# They take about 2 ms, their masks aside.
_REGIONS_PER_PART = 256


class LabelStudioEncoder(ArrayEncoder):
    """See the module."""

    smaller = "RectangleLabels alone"
    fewer = "a higher model_score_threshold"
    tail = b"}"

    def __init__(self, form: LabelStudio) -> None:
        masks: MaskFormat | Outlines = "none"
        if form.with_masks:
            has_brush = any(tag.type == "brushlabels" for tag in form.tags)
            masks = "outlines and brush" if has_brush else "outlines"
        super().__init__(masks)
        self._form = form
        self._scores: list[float] = []  # of all regions, in no particular order

    def split(self, detections: Detections) -> Sequence[Detections]:
        """Parts as for other forms, fewer objects each if there are many tags."""
        most = max(1, _REGIONS_PER_PART // len(self._form.tags))
        return [
            part[start : start + most]
            for part in super().split(detections)
            for start in range(0, max(len(part), 1), most)
        ]

    def left_out(self, detections: Detections) -> int:
        """How many of the detections have labels that no tag has."""
        labels = zip(*(tag.labels for tag in self._form.tags), strict=True)
        is_taken = [any(label is not None for label in theirs) for theirs in labels]
        return sum(not is_taken[label_id - 1] for label_id in detections.labels.tolist())

    def objects(
        self, image: Image, part: Detections, masks: Sequence[Any] | None, info: ModelInfo
    ) -> list[dict[str, object]]:
        """Regions in Label Studio's own form, any number of an object."""
        return [
            region
            for index, (label_id, score) in enumerate(zip(part.labels.tolist(), part.scores, strict=True))
            for region in self._regions(image, part.boxes[index], label_id, score, masks and masks[index])
        ]

    def head(self) -> bytes:
        """The prediction up to its regions; `score` is the mean of theirs, or null if there are none."""
        mean = np.float32(math.fsum(self._scores) / len(self._scores)) if self._scores else None
        prediction = {"model_version": self._form.model_version, "score": mean}
        return orjson.dumps(prediction, option=orjson.OPT_SERIALIZE_NUMPY)[:-1] + b',"result":'

    def _regions(
        self, image: Image, box: Float32Array, label_id: int, score: np.float32, mask: Any
    ) -> Iterator[dict[str, object]]:
        shapes: dict[RegionType, list[dict[str, object]]] = {}
        for tag in self._form.tags:
            label = tag.labels[label_id - 1]
            if label is None or score <= tag.score_thresh:
                continue
            if tag.type not in shapes:
                shapes[tag.type] = _SHAPES[tag.type](box, mask, image.size)
            for shape in shapes[tag.type]:
                self._scores.append(float(score))
                yield {
                    "id": secrets.token_hex(5),
                    "type": tag.type,
                    "from_name": tag.from_name,
                    "to_name": tag.to_name,
                    "original_width": image.width,
                    "original_height": image.height,
                    "image_rotation": 0,
                    "score": score,
                    "value": shape | {tag.type: [label]},
                }


def _rectangles(box: Float32Array, mask: Any, image_size: tuple[int, int]) -> list[dict[str, object]]:
    corners = box.astype(float)
    [[x, y], [width, height]] = _percent([corners[:2], corners[2:] - corners[:2]], image_size)
    return [{"x": x, "y": y, "width": width, "height": height, "rotation": 0}]


def _polygons(box: Float32Array, mask: Any, image_size: tuple[int, int]) -> list[dict[str, object]]:
    outlines, _ = mask
    return [{"points": _percent(np.reshape(outline, (-1, 2)), image_size), "closed": True} for outline in outlines]


def _brushes(box: Float32Array, mask: Any, image_size: tuple[int, int]) -> list[dict[str, object]]:
    outlines, brush = mask
    # Encoded once for all tags.
    numbers = orjson.Fragment(orjson.dumps(brush, option=orjson.OPT_SERIALIZE_NUMPY))
    return [{"format": "rle", "rle": numbers}] if outlines else []


def _percent(points: ArrayLike, image_size: tuple[int, int]) -> NDArray[np.float64]:
    """Pairs of x and y, in percent of the image."""
    height, width = image_size
    return np.round(100 * np.asarray(points) / [width, height], 4)


# Each takes a box, a mask and the image's (height, width), and returns the values of an object's regions.
_SHAPES: Mapping[RegionType, Callable[[Float32Array, Any, tuple[int, int]], list[dict[str, object]]]] = {
    "rectanglelabels": _rectangles,
    "polygonlabels": _polygons,
    "brushlabels": _brushes,
}
