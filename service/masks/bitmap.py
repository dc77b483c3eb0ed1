"""Masks as bitmaps of the smallest rectangle around them, row by row. Knows runs of pixels; knows no image, model or
HTTP.
"""

from __future__ import annotations

from base64 import b64encode
from typing import TypedDict

import numpy as np

from service.jit import compiled
from service.masks._row_runs import row_runs
from service.masks._runs import Int32Array, find_runs
from service.structures import Float32Array, Int64Array, MaskStyle, UInt8Array


class Bitmap(TypedDict):
    """A mask cut to the smallest rectangle that holds it; of size (0, 0) if it is empty.

    `origin` is the (x, y) of the rectangle's first pixel in the image, `size` its (height, width), and `bits` its
    pixels, eight to a byte with the first in the highest bit, in base64.
    """

    origin: list[int]
    size: list[int]
    bits: str


def encode_bitmaps(
    masks: Float32Array,
    boxes: Float32Array,
    image_size: tuple[int, int],
    *,
    style: MaskStyle = "torchvision",
) -> list[Bitmap]:
    """Draw each mask, at the threshold 0.5; arguments and errors as in `rle.encode_rle`."""
    runs = find_runs(masks, boxes, image_size, style=style)
    bitmaps: list[Bitmap] = []
    for index in range(len(runs)):
        mask = row_runs(runs, index)
        left, right = (int(mask.xs.min()), int(mask.xs.max())) if len(mask.xs) else (0, 0)
        pixels = _fill(mask.rows, mask.xs, left, right)
        bits = b64encode(np.packbits(pixels).tobytes()).decode("ascii")
        bitmaps.append({"origin": [left, mask.first_y], "size": list(pixels.shape), "bits": bits})
    return bitmaps


@compiled()
def _fill(rows: Int64Array, xs: Int32Array, left: int, right: int) -> UInt8Array:
    pixels = np.zeros((len(rows) - 1, right - left), np.uint8)
    for row in range(len(rows) - 1):
        for i in range(rows[row], rows[row + 1], 2):
            pixels[row, xs[i] - left : xs[i + 1] - left] = 1
    return pixels
