"""Encodes detections as a JSON array with an object for each: what the forms that are JSON have in common.

Shapes: D detections of one image.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from service.answers.encoder import Encoder
from service.errors import AnswerTooLargeError
from service.masks.bitmap import encode_bitmaps
from service.masks.brush import encode_brush
from service.masks.png import encode_crops, encode_png, smallest_png
from service.masks.polygons import encode_outlines, encode_polygons
from service.masks.rle import encode_rle
from service.structures import AnnotatorMasks, Detections, Float32Array, Image, MaskFormat, MaskStyle, ModelInfo


def _label_studio(
    masks: Float32Array, boxes: Float32Array, image_size: tuple[int, int], *, style: MaskStyle
) -> Sequence[object]:
    """Of each mask its `outlines` and the bytes of its `brush`: a project may want either, or both."""
    outlines = encode_outlines(masks, boxes, image_size, style=style)
    brushes = encode_brush(masks, boxes, image_size, style=style)
    return [{"outlines": outline, "brush": brush} for outline, brush in zip(outlines, brushes, strict=True)]


def _cvat(
    masks: Float32Array, boxes: Float32Array, image_size: tuple[int, int], *, style: MaskStyle
) -> Sequence[object]:
    """Of each mask its bitmap and its `outlines`."""
    outlines = encode_outlines(masks, boxes, image_size, style=style)
    bitmaps = encode_bitmaps(masks, boxes, image_size, style=style)
    return [{"outlines": outline, **bitmap} for outline, bitmap in zip(outlines, bitmaps, strict=True)]


MASK_ENCODERS: Mapping[MaskFormat | AnnotatorMasks, Callable[..., Sequence[object]]] = {
    "rle": encode_rle,
    "polygons": encode_polygons,
    "png": encode_png,
    "crop": encode_crops,
    "label_studio": _label_studio,
    "cvat": _cvat,
}

# What to ask for instead of an answer that would be too large; without masks if nothing else.
_SMALLER: Mapping[MaskFormat | AnnotatorMasks, str] = {
    "png": "masks=crop or masks=rle",
    "polygons": "masks=rle or masks=crop",
    "label_studio": "rectangles",
    "cvat": "rectangles",
}
# A mask takes time in proportion to the sides of its box. These take 2 to 4 ms with smooth outlines and ten times as
# long at worst, while handing a part over to a thread takes a tenth of a millisecond of Python's lock.
_SIDES_PER_PART_PIXELS = 40_000
_SIDES_PER_SLOW_PART_PIXELS: Mapping[MaskFormat | AnnotatorMasks, int] = {
    "polygons": 20_000,
    "label_studio": 10_000,
    "cvat": 10_000,
}
# Limit for all masks of an answer together, about a second of work: a thousand objects of 2000 x 2000 pixels each.
_MOST_SIDES_PIXELS = 4_000_000
# Some ten microseconds each, however small they are.
_MOST_MASKS_PER_PART = 128


class ArrayEncoder(Encoder):
    """See the module.

    Args:
        masks: how `objects` gets the masks.
    """

    def __init__(self, masks: MaskFormat | AnnotatorMasks) -> None:
        self._masks = masks
        self.smaller = _SMALLER.get(masks, "masks=none")

    def split(self, detections: Detections) -> Sequence[Detections]:
        """Parts of a few milliseconds, unless a single mask takes longer.

        Raises:
            AnswerTooLargeError: the masks would take seconds.
        """
        if self._masks == "none" or detections.masks is None or len(detections) == 0:
            return [detections]
        boxes = detections.boxes
        sides = (boxes[:, 2:] - boxes[:, :2]).sum(axis=1).cumsum()
        if sides[-1] > _MOST_SIDES_PIXELS:
            raise AnswerTooLargeError(
                f"{len(boxes)} masks whose boxes have {sides[-1]:.0f} pixels of width and height together would take "
                f"too long to encode, at most {_MOST_SIDES_PIXELS}; ask for fewer by max_detections or score_thresh, "
                f"or for masks=none"
            )
        sides_per_part = _SIDES_PER_SLOW_PART_PIXELS.get(self._masks, _SIDES_PER_PART_PIXELS)
        part = np.maximum(sides // sides_per_part, np.arange(len(boxes)) // _MOST_MASKS_PER_PART)
        ends = [*(np.flatnonzero(np.diff(part)) + 1).tolist(), len(boxes)]
        return [detections[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def least_bytes(self, image_size: tuple[int, int], detections: Detections) -> int:
        """Only masks as PNGs of the whole image have a minimum size that is known beforehand."""
        return len(detections) * smallest_png(image_size) if self._masks == "png" else 0

    @abstractmethod
    def objects(
        self, image: Image, part: Detections, masks: Sequence[Any] | None, info: ModelInfo
    ) -> Sequence[Mapping[str, object]]:
        """The objects of the array, as `orjson` takes them.

        Args:
            masks: for each detection, encoded; None without masks.
        """

    def encode(self, image: Image, part: Detections, info: ModelInfo, *, should_stop: Callable[[], bool]) -> bytes:
        """The elements of an array with an object for each detection."""
        masks = None
        if self._masks != "none" and part.masks is not None:
            masks = MASK_ENCODERS[self._masks](part.masks, part.boxes, image.size, style=info.mask_style)
        return orjson.dumps(self.objects(image, part, masks, info), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]

    def join(self, parts: Sequence[bytes]) -> bytes:
        """One array of the elements of all parts."""
        commas = itertools.chain([b"["], itertools.repeat(b","))
        # In one go, without copies before it: for large answers, `join` lets other threads run Python meanwhile.
        return b"".join([*itertools.chain.from_iterable(zip(commas, parts, strict=False)), b"]"])
