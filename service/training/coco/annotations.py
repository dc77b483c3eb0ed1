"""Read the rows of `annotations`; each is either understood or reported as bad.

Shapes: boxes are (x1, y1, x2, y2) in pixels of the upright picture, H x W the picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from service.training.coco.frames import Frame
from service.training.coco.report import DataReport
from service.training.coco.segmentations import (
    BadSegmentation,
    Rle,
    area_of,
    box_of,
    is_there,
    read_segmentation,
    rectangle,
)
from service.training.coco.values import Ids, id_of, number_of

BOX_TOLERANCE_PIXELS = 1.0
"""A box may reach this far outside its image: common tools round."""
Masks = Literal["required", "if_any", "none"]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object or crowd region.

    Attributes:
        label: from 1.
        box: (x1, y1, x2, y2) in pixels of the upright picture, within it.
        area: in pixels; decides the size class in COCO's figures.
        rle: its mask; None in a set without masks.
    """

    label: int
    box: Box
    area: float
    is_crowd: bool
    rle: Rle | None


class _BadAnnotation(ValueError):
    """An annotation cannot be used; the message says why."""


class AnnotationReader:
    """Reads the rows of one file.

    Args:
        images: the ids of all images.
        frames: of the images, by id; annotations of an image without a frame are skipped.
        label_of: the label of each category id, None if its annotations do not count.
        masks: whether every object needs one; `if_any`: whether any has one.
        report: where findings go.

    Attributes:
        has_masks: whether the objects read so far have masks.
    """

    def __init__(
        self,
        *,
        images: Sequence[str],
        frames: Mapping[str, Frame],
        label_of: Mapping[str, int | None],
        masks: Masks,
        report: DataReport,
    ) -> None:
        self._frames = frames
        self._label_of = label_of
        self._images = Ids(images)
        self._known_images = frozenset(images)
        self._categories = Ids(label_of)
        self._masks = masks
        self._report = report
        self.has_masks = False
        self._boxes = self._fractions = self._corners = self._misfits = 0

    def read(self, rows: Sequence[Any], *, drops_bad: bool) -> dict[str, list[Annotation]]:
        """The good annotations by image id; the bad ones go into the report.

        Args:
            drops_bad: whether to leave bad annotations out; duplicate ids are then repaired where possible.
        """
        self.has_masks = self._masks == "required" or (self._masks == "if_any" and any(map(_has_segmentation, rows)))
        found: dict[str, list[Annotation]] = {key: [] for key in self._frames}
        seen: dict[str, object] = {}
        for place, row in enumerate(rows):
            if not isinstance(row, dict):
                self._report.bad.append(f"annotations[{place}]: expected an object, got {type(row).__name__}")
                continue
            key = id_of(row.get("id"))
            try:
                if key is not None and key in seen and self._is_copy(row, seen[key], drops_bad):
                    continue
                image, annotation = self._read_one(row)
            except _BadAnnotation as error:
                self._report.bad.append(f"annotation {_shown(row.get('id', f'at place {place}'))}: {error}")
                continue
            if key is not None:
                seen.setdefault(key, row)
            if annotation is not None:
                found[image].append(annotation)
        self._judge_boxes()
        if drops_bad and self._report.bad:
            self._report.left_out["bad annotations"] += len(self._report.bad)
        return found

    def _is_copy(self, row: Mapping[str, Any], first: object, drops_bad: bool) -> bool:
        """Whether the row is identical to an earlier row with the same id.

        Raises:
            _BadAnnotation: the id is a duplicate, and bad annotations may not be dropped.
        """
        if not drops_bad:
            raise _BadAnnotation("the id is used more than once")
        if row == first:
            self._report.left_out["annotations that repeat another, id and all"] += 1
            return True
        self._report.repaired["ids of annotations that another has too, numbered anew"] += 1
        return False

    def _read_one(self, row: Mapping[str, Any]) -> tuple[str, Annotation | None]:
        image = self._images.find(row.get("image_id"))
        if image is None or image not in self._known_images:
            raise _BadAnnotation(f"unknown image_id {_shown(row.get('image_id'))}")
        if image not in self._frames:
            return image, None
        frame = self._frames[image]
        category = self._categories.find(row.get("category_id"))
        problems: list[str] = []
        if category is None or category not in self._label_of:
            problems.append(f"unknown category_id {_shown(row.get('category_id'))}")
        elif self._label_of[category] is None:
            self._report.left_out["annotations of categories that are no label"] += 1
            return image, None
        is_crowd = self._is_crowd(row, problems)
        rle = self._mask(row, frame, self.has_masks and not is_crowd, problems)
        box = self._box(row, frame, rle, problems)
        if problems or box is None:
            raise _BadAnnotation("; ".join(problems))
        if rle is None and self.has_masks:
            self._report.repaired["crowd regions without a mask, taken as their boxes"] += 1
            rle = rectangle(box, frame.upright_size)
        assert category is not None  # otherwise it would be a problem
        label = self._label_of[category]
        assert label is not None
        area = self._area(row, box, rle)
        return image, Annotation(label, box, area, is_crowd, rle if self.has_masks else None)

    def _is_crowd(self, row: Mapping[str, Any], problems: list[str]) -> bool:
        value = row.get("iscrowd")
        if value is None:
            self._report.repaired["annotations without iscrowd, taken as single objects"] += 1
            return False
        if isinstance(value, bool):
            self._report.repaired["values of iscrowd that are true or false, taken as 1 or 0"] += 1
            return value
        number = number_of(value)
        if number not in (0, 1):
            problems.append(f"expected iscrowd 0 or 1, got {_shown(value)}")
        return number == 1

    def _mask(self, row: Mapping[str, Any], frame: Frame, is_needed: bool, problems: list[str]) -> Rle | None:
        """The mask, if it is needed itself, or to derive the box or the area."""
        segmentation = row.get("segmentation")
        is_used = self.has_masks or _is_missing(row.get("bbox")) or not _is_area(row.get("area"))
        if not is_used or not (is_needed or is_there(segmentation)):
            return None
        try:
            rle, bad_parts = read_segmentation(segmentation, frame)
        except BadSegmentation as error:
            if is_needed:
                problems.append(str(error))
            return None
        if bad_parts:
            self._report.repaired["bad parts of masks passed over, of which the other parts count"] += bad_parts
        return rle

    def _box(self, row: Mapping[str, Any], frame: Frame, rle: Rle | None, problems: list[str]) -> Box | None:
        """The box in the upright picture, clipped to it."""
        written = row.get("bbox")
        if _is_missing(written) and rle is not None:
            self._report.repaired["annotations without a bbox, taken from the mask"] += 1
            return box_of(rle)
        numbers = [number_of(side) for side in written] if isinstance(written, list) else []
        sides = [side for side in numbers if side is not None]
        if len(sides) != 4 or len(numbers) != 4:
            problems.append(f"expected bbox [x, y, width, height] of finite numbers, got {_shown(written)}")
            return None
        if any(isinstance(side, str) for side in written):  # type: ignore[union-attr]  # it is a list by now
            self._report.repaired["boxes with numbers written as texts"] += 1
        x, y, box_width, box_height = sides
        height, width = frame.stored_size
        self._look_at(sides, (height, width), number_of(row.get("area")))
        slack = BOX_TOLERANCE_PIXELS
        if not (box_width > 0 and box_height > 0):
            problems.append(f"expected a box with area, got {box_width:g} x {box_height:g}")
            return None
        if min(x, y) < -slack or x + box_width > width + slack or y + box_height > height + slack:
            problems.append(f"box {_shown(written)} reaches outside its image of {width} x {height}")
            return None
        x1, y1 = min(max(x, 0.0), width), min(max(y, 0.0), height)
        x2, y2 = min(x + box_width, width), min(y + box_height, height)
        if not (x1 < x2 and y1 < y2):
            problems.append(f"box {_shown(written)} lies outside its image of {width} x {height}")
            return None
        box = frame.turned_box((x1, y1, x2, y2))
        self._misfits += rle is not None and _overlap(box, box_of(rle)) < 0.5
        return box

    def _area(self, row: Mapping[str, Any], box: Box, rle: Rle | None) -> float:
        written = row.get("area")
        x1, y1, x2, y2 = box
        # A mask lies within its box, so a larger area is a mistake; with 1e10 or more COCO would ignore the object.
        largest = 1.05 * (x2 - x1 + 2) * (y2 - y1 + 2)
        number = number_of(written)
        if number is not None and 0 < number <= largest:
            return number
        self._report.repaired[f"annotations {'without an' if written is None else 'with an impossible'} area"] += 1
        return area_of(rle) if rle is not None else (x2 - x1) * (y2 - y1)

    def _look_at(self, box: Sequence[float], image_size: tuple[int, int], area: float | None) -> None:
        """Collect evidence that only all boxes together can give: a different unit, a different order of numbers."""
        x, y, width, height = box
        self._boxes += 1
        self._fractions += min(image_size) > 8 and max(map(abs, box)) <= 1
        slack = BOX_TOLERANCE_PIXELS
        are_corners = -slack <= x < width <= image_size[1] + slack and -slack <= y < height <= image_size[0] + slack
        fits = x + width <= image_size[1] + slack and y + height <= image_size[0] + slack
        if are_corners and area is not None and fits:
            # Both interpretations lie within the picture; the area shows which one was meant.
            are_corners = abs(area - (width - x) * (height - y)) < 0.01 * area < abs(area - width * height)
            self._corners += are_corners
        elif are_corners:
            self._corners += not fits

    def _judge_boxes(self) -> None:
        if self._boxes and self._fractions == self._boxes:
            self._report.stopping.append(
                "no number in any bbox is above 1: they look like fractions of the picture; COCO has pixels"
            )
        if 2 * self._corners > self._boxes:
            self._report.stopping.append(
                f"{self._corners} of {self._boxes} boxes look like [x1, y1, x2, y2]; COCO has [x, y, width, height]"
            )
        if self._misfits:
            self._report.notes.append(
                f"{self._misfits} boxes do not fit their masks (intersection over union under 0.5)"
            )


def _has_segmentation(row: object) -> bool:
    """Whether it is an object with a mask. Crowds don't count: they often have masks even if objects have none."""
    return isinstance(row, dict) and not _is_truthy(row.get("iscrowd")) and is_there(row.get("segmentation"))


def _is_truthy(value: object) -> bool:
    return value is True or number_of(value) == 1


def _is_missing(box: object) -> bool:
    """Whether there is no box, or only the zeros that some tools write instead."""
    return box is None or box == [] or box == [0, 0, 0, 0]


def _is_area(value: object) -> bool:
    number = number_of(value)
    return number is not None and number > 0


def _overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(width, 0.0) * max(height, 0.0)
    return common / (_size(one) + _size(other) - common)


def _size(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
