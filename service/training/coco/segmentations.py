"""Convert segmentations in all the forms that tools write to one: COCO's compressed run lengths. pycocotools rasterises
the polygons, so that a mask has the same pixels as in COCO's own evaluation.

Shapes: H x W the image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from service.structures import UInt8Array
from service.training.coco.frames import Frame
from service.training.coco.values import number_of

MAX_NESTING = 4
_NOT_DECODED = "expected COCO's run lengths in 'counts', got some that do not decode"


class Rle(TypedDict):
    """One binary mask in pycocotools' form: `size` is [height, width], `counts` are compressed run lengths."""

    size: list[int]
    counts: bytes


class BadSegmentation(ValueError):
    """Nothing of a segmentation can be used; the message says why."""


def is_there(segmentation: object) -> bool:
    """Whether there is any content, valid or not: null, `[]`, `[[]]`, `{}` and an empty text are nothing."""
    return next(_parts(segmentation), None) is not None


def read_segmentation(segmentation: object, frame: Frame) -> tuple[Rle, int]:
    """The union of the good parts of a segmentation.

    A segmentation is a polygon `[x, y, …]` or a list of them, of points `[x, y]` or `{"x": …, "y": …}`, or of RLEs with
    compressed or plain counts; or one RLE.

    Args:
        segmentation: as written in the file.
        frame: the picture that it was drawn on, and its orientation.

    Returns:
        The mask in the upright picture, with at least one pixel, and the number of bad parts that were skipped.

    Raises:
        BadSegmentation: no part is good.
    """
    masks: list[Rle] = []
    problems: list[str] = []
    for part in _parts(segmentation):
        try:
            rle = _from_rle(part, frame) if isinstance(part, dict) else _from_polygon(part, frame)
            if not coco_mask.area(rle):
                raise BadSegmentation("expected a mask with at least one pixel, got an empty one")
            masks.append(rle)
        except BadSegmentation as error:
            problems.append(str(error))
    if not masks:
        raise BadSegmentation(problems[0] if problems else "expected a segmentation (polygons or RLE), got none")
    return (masks[0] if len(masks) == 1 else coco_mask.merge(masks)), len(problems)


def rectangle(box: Sequence[float], image_size: tuple[int, int]) -> Rle:
    """The mask of a box (x1, y1, x2, y2) in pixels of an image (height, width)."""
    x1, y1, x2, y2 = box
    height, width = image_size
    [rle] = coco_mask.frPyObjects([[x1, y1, x2, y1, x2, y2, x1, y2]], height, width)
    return rle  # type: ignore[no-any-return]  # pycocotools has no annotations


def box_of(rle: Rle) -> tuple[float, float, float, float]:
    """The box (x1, y1, x2, y2) around a mask's pixels."""
    x, y, width, height = (float(side) for side in coco_mask.toBbox(rle))
    return x, y, x + width, y + height


def area_of(rle: Rle) -> float:
    """Number of a mask's pixels."""
    return float(coco_mask.area(rle))


def _parts(value: object, depth: int = 0) -> Iterator[Any]:
    """Yield polygons as flat lists and RLEs as mappings; anything else is yielded unchanged."""
    if isinstance(value, str) and depth == 0 and value.lstrip()[:1] in ("[", "{"):
        # A table column that was written as JSON.
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            yield value
            return
    if value is None or value == "" or value == [] or value == {}:
        return
    if not isinstance(value, list) or depth == MAX_NESTING:
        yield value
    elif all(_is_point(item) for item in value):
        yield [item[key] for item in value for key in (("x", "y") if isinstance(item, dict) else (0, 1))]
    elif any(isinstance(item, list | dict) for item in value):
        for item in value:
            yield from _parts(item, depth + 1)
    else:
        yield value


def _is_point(item: object) -> bool:
    if isinstance(item, dict):
        return item.keys() == {"x", "y"}
    return isinstance(item, list) and len(item) == 2 and not any(isinstance(side, list | dict) for side in item)


def _from_polygon(part: object, frame: Frame) -> Rle:
    points = _points(part)
    height, width = frame.stored_size
    # A point further away is a mistake, and drawing a line to it would take unlimited memory.
    if np.abs(points).max() > 2 * max(height, width):
        raise BadSegmentation(f"a polygon's point lies far outside its image of {width} x {height}")
    upright_height, upright_width = frame.upright_size
    polygon = frame.turned_points(points).ravel().tolist()
    [rle] = coco_mask.frPyObjects([polygon], upright_height, upright_width)
    return rle  # type: ignore[no-any-return]  # pycocotools has no annotations


def _points(part: object) -> NDArray[np.float64]:
    """(P, 2) x, y of a flat list."""
    expected = "expected polygons of at least 3 points as [x, y, x, y, …]"
    if not isinstance(part, list) or any(isinstance(one, bool) for one in part):
        raise BadSegmentation(f"{expected}, got {_shortened(part)}")
    try:
        numbers = np.asarray(part, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise BadSegmentation(f"{expected}, got {_shortened(part)}") from None
    if numbers.ndim != 1 or len(numbers) < 6 or len(numbers) % 2 or not np.isfinite(numbers).all():
        raise BadSegmentation(f"{expected}, got {_shortened(part)}")
    return numbers.reshape(-1, 2)


def _from_rle(part: Mapping[str, Any], frame: Frame) -> Rle:
    height, width = frame.stored_size
    size = part.get("size", [height, width])
    if not isinstance(size, list) or [number_of(side) for side in size] != [height, width]:
        raise BadSegmentation(f"expected an RLE of size {[height, width]}, got {_shortened(size)}")
    counts = _counts(part.get("counts"))
    if sum(counts) != height * width:
        raise BadSegmentation(
            f"expected run lengths that add up to the {height * width} pixels of {width} x {height}, got {sum(counts)}"
        )
    rle: Rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    if frame.is_upright:
        return rle
    bitmap: UInt8Array = coco_mask.decode(rle)
    turned: Rle = coco_mask.encode(np.asfortranarray(frame.turned_pixels(bitmap)))
    return turned


def _counts(counts: object) -> list[int]:
    """Run lengths, zeros first, from plain or compressed ones."""
    if isinstance(counts, str):
        return _decompressed(counts)
    if not isinstance(counts, list):
        raise BadSegmentation(f"expected COCO's run lengths in 'counts', got {_shortened(counts)}")
    numbers = [number_of(one) for one in counts]
    lengths = [int(one) for one in numbers if one is not None and one >= 0 and one.is_integer()]
    if len(lengths) != len(counts):
        raise BadSegmentation(f"{_NOT_DECODED}: expected whole numbers from 0, got {_shortened(counts)}")
    return lengths


def _decompressed(text: str) -> list[int]:
    """The run lengths that COCO's `rleToString` wrote: five bits per character, each length minus the one two before
    it.

    Done here because pycocotools reads beyond the end of the text, and turns arbitrary memory into pixels if lengths
    are missing.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise BadSegmentation(f"{_NOT_DECODED}: {_shortened(text)}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        if value < 0:
            raise BadSegmentation(f"{_NOT_DECODED}: a negative length in {_shortened(text)}")
        counts.append(value)
        value, shift = 0, 0
    if shift:
        raise BadSegmentation(f"{_NOT_DECODED}: the end is missing")
    return counts


def _shortened(value: object) -> str:
    text = repr(value[:20] if isinstance(value, list | str) else value)
    return text if len(text) <= 60 else f"{text[:60]}…"
