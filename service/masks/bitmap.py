"""Masks as bitmaps of the smallest rectangle around them, row by row, as text. Knows runs of pixels; knows no image,
model or HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from service.jit import compiled
from service.masks._row_runs import RowRuns, row_runs
from service.masks._runs import Int32Array, find_runs
from service.structures import Float32Array, Int64Array, MaskStyle, UInt8Array

# Of a piece of the text: few enough to copy within a fraction of a millisecond.
_PIECE_PIXELS = 128 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Bitmap:
    """A mask cut to the smallest rectangle that holds it; of width and height 0 if it is empty.

    Attributes:
        x, y: the rectangle's first pixel in the image.
        width, height: in pixels.
    """

    x: int
    y: int
    width: int
    height: int
    _runs: RowRuns

    def write(self) -> Iterator[bytes]:
        """The pixels row by row as text, `0,` or `1,` each, in pieces of whole rows."""
        rows = max(1, _PIECE_PIXELS // max(1, self.width))
        for first in range(0, self.height, rows):
            last = min(first + rows, self.height)
            yield _text(self._runs.rows[first : last + 1], self._runs.xs, self.x, self.width).tobytes()


def find_bitmaps(
    masks: Float32Array,
    boxes: Float32Array,
    image_size: tuple[int, int],
    *,
    style: MaskStyle = "torchvision",
) -> list[Bitmap]:
    """Find each mask's rectangle, at the threshold 0.5; arguments and errors as in `rle.encode_rle`."""
    runs = find_runs(masks, boxes, image_size, style=style)
    bitmaps = []
    for index in range(len(runs)):
        mask = row_runs(runs, index)
        left, right = (int(mask.xs.min()), int(mask.xs.max())) if len(mask.xs) else (0, 0)
        bitmaps.append(Bitmap(left, mask.first_y, right - left, len(mask.rows) - 1, mask))
    return bitmaps


@compiled()
def _text(rows: Int64Array, xs: Int32Array, left: int, width: int) -> UInt8Array:
    text = np.empty((len(rows) - 1, 2 * width), np.uint8)
    text[:, ::2] = ord("0")
    text[:, 1::2] = ord(",")
    for row in range(len(rows) - 1):
        for i in range(rows[row], rows[row + 1], 2):
            text[row, 2 * (xs[i] - left) : 2 * (xs[i + 1] - left) : 2] = ord("1")
    return text
