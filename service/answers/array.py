"""Encodes detections as a JSON array with an object for each: what the forms that are JSON have in common.

Shapes: D detections of one image.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import orjson

from service.answers.encoder import Encoder
from service.errors import AnswerTooLargeError
from service.masks.bitmap import find_bitmaps
from service.masks.brush import encode_brush
from service.masks.png import encode_crops, encode_png, smallest_png
from service.masks.polygons import encode_outlines, encode_polygons
from service.masks.rle import encode_rle
from service.structures import Detections, Float32Array, Image, MaskFormat, MaskStyle, ModelInfo

Outlines = Literal["outlines", "outlines and brush", "outlines and bitmap"]
"""What annotation tools take of a mask."""


def _outlines(
    masks: Float32Array, boxes: Float32Array, image_size: tuple[int, int], *, style: MaskStyle
) -> Sequence[object]:
    return [(outline, None) for outline in encode_outlines(masks, boxes, image_size, style=style)]


def _with_brush(
    masks: Float32Array, boxes: Float32Array, image_size: tuple[int, int], *, style: MaskStyle
) -> Sequence[object]:
    outlines = encode_outlines(masks, boxes, image_size, style=style)
    brushes = encode_brush(masks, boxes, image_size, style=style)
    return list(zip(outlines, brushes, strict=True))


def _with_bitmap(
    masks: Float32Array, boxes: Float32Array, image_size: tuple[int, int], *, style: MaskStyle
) -> Sequence[object]:
    outlines = encode_outlines(masks, boxes, image_size, style=style)
    return list(zip(outlines, find_bitmaps(masks, boxes, image_size, style=style), strict=True))


MASK_ENCODERS: Mapping[MaskFormat | Outlines, Callable[..., Sequence[object]]] = {
    "rle": encode_rle,
    "polygons": encode_polygons,
    "png": encode_png,
    "crop": encode_crops,
    "outlines": _outlines,
    "outlines and brush": _with_brush,
    "outlines and bitmap": _with_bitmap,
}

# Limits for one part: the sides in pixels of its masks' boxes, to which most of its time is proportional, and the
# number of its masks. It takes 2 to 4 ms with smooth outlines and ten times as long at worst, while handing it to a
# thread takes a tenth of a millisecond of Python's lock. A mask as PNG takes time for the whole image, too.
_PART_LIMITS: Mapping[MaskFormat | Outlines, tuple[int, int]] = {
    "png": (40_000, 64),
    "polygons": (20_000, 128),
    "outlines": (20_000, 128),
    "outlines and brush": (20_000, 128),
    "outlines and bitmap": (20_000, 128),
}
_USUAL_PART_LIMITS = (40_000, 128)
# Limit for all masks of an answer together, about a second of work: a thousand objects of 2000 x 2000 pixels each.
_MOST_SIDES_PIXELS = 4_000_000


class ArrayEncoder(Encoder):
    """See the module.

    Args:
        masks: how `objects` gets the masks.

    Attributes:
        tail: what comes after the array.
    """

    smaller = "masks=none"
    tail = b""

    def __init__(self, masks: MaskFormat | Outlines) -> None:
        self._masks = masks

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
        most_pixels, most_masks = _PART_LIMITS.get(self._masks, _USUAL_PART_LIMITS)
        part = np.maximum(sides // most_pixels, np.arange(len(boxes)) // most_masks)
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

    def encode(
        self, image: Image, part: Detections, info: ModelInfo, *, should_stop: Callable[[], bool]
    ) -> Iterator[bytes]:
        """Elements of the array, with commas between them."""
        masks = None
        if self._masks != "none" and part.masks is not None:
            masks = MASK_ENCODERS[self._masks](part.masks, part.boxes, image.size, style=info.mask_style)
        yield from self.write(self.objects(image, part, masks, info), masks)

    def write(self, objects: Sequence[Mapping[str, object]], masks: Sequence[Any] | None) -> Iterator[bytes]:
        """What `encode` yields, of its objects."""
        if objects:
            yield orjson.dumps(objects, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]

    def join(self, parts: Sequence[Sequence[bytes]]) -> bytes:
        """One array of the elements of all parts."""
        commas = itertools.chain([b"["], itertools.repeat(b","))
        filled = [(comma, *part) for comma, part in zip(commas, filter(None, parts), strict=False)] or [(b"[",)]
        # In one go, without copies before it: for large answers, `join` lets other threads run Python meanwhile.
        return b"".join([self.head(), *itertools.chain.from_iterable(filled), b"]", self.tail])

    def head(self) -> bytes:
        """What comes before the array, once all parts are encoded."""
        return b""
