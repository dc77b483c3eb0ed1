"""Masks as Label Studio's run-length encoding of brush strokes: bits that describe an RGBA picture of the image's size,
row by row, which is not COCO's encoding. Knows runs of pixels; knows no image, model or HTTP.

The format is that of @thi.ng/rle-pack: a header of the number of values (32 bits), the bits of a value less 1 (5), and
four run-length widths less 1 (4 each); then, for each run, 1, the index of a width (2), the length less 1, the value.
Values are bytes, four to a pixel: 255 throughout the mask, 0 elsewhere.
"""

from __future__ import annotations

import numpy as np

from service.jit import compiled
from service.masks._row_runs import row_runs
from service.masks._runs import Int32Array, find_runs
from service.structures import Float32Array, Int64Array, MaskStyle, UInt8Array

_MAX_PIXELS = 2**30 - 1
# What Label Studio itself writes.
_WIDTHS = (3, 4, 8, 16)
_LONGEST_RUN = 2**16


def encode_brush(
    masks: Float32Array,
    boxes: Float32Array,
    image_size: tuple[int, int],
    *,
    style: MaskStyle = "torchvision",
) -> list[UInt8Array]:
    """Encode the pixels of `paste_masks_in_image(masks, boxes, image_size) >= 0.5`; arguments as in `rle.encode_rle`.

    Returns:
        For each object the bytes that Label Studio takes as `rle`, a list of numbers.

    Raises:
        ValueError: other shapes, a box that is not finite, or an image with more pixels than the format can count.
    """
    height, width = image_size
    if height * width > _MAX_PIXELS:
        raise ValueError(f"expected an image of at most {_MAX_PIXELS} pixels, got {height} x {width}")
    runs = find_runs(masks, boxes, image_size, style=style)
    encoded = []
    for index in range(len(runs)):
        mask = row_runs(runs, index)
        encoded.append(_encode(mask.first_y, mask.rows, mask.xs, height, width))
    return encoded


@compiled()
def _encode(first_y: int, rows: Int64Array, xs: Int32Array, height: int, width: int) -> UInt8Array:
    # A run takes at most 27 bits, and long ones as many again for each 65536 values.
    out = np.zeros(16 + 4 * (len(xs) + 2 + 4 * height * width // _LONGEST_RUN), np.uint8)
    at = _append(out, 0, 4 * height * width, 32)
    at = _append(out, at, 7, 5)
    for bits in _WIDTHS:
        at = _append(out, at, bits - 1, 4)
    position = start = end = 0  # in pixels of the whole image; the run [start, end) is not written yet
    for row in range(len(rows) - 1):
        offset = (first_y + row) * width
        for i in range(rows[row], rows[row + 1], 2):
            if offset + xs[i] != end:  # Otherwise the run continues from the end of the previous row.
                at = _append_run(out, at, start - position, 0)
                at = _append_run(out, at, end - start, 255)
                position, start = end, offset + xs[i]
            end = offset + xs[i + 1]
    at = _append_run(out, at, start - position, 0)
    at = _append_run(out, at, end - start, 255)
    at = _append_run(out, at, height * width - end, 0)
    return out[: at // 8 + 1].copy()


@compiled()
def _append_run(out: UInt8Array, at: int, pixels: int, value: int) -> int:
    length = 4 * pixels
    while length > 0:
        piece = min(length, _LONGEST_RUN)
        index = 0
        while piece > 1 << _WIDTHS[index]:
            index += 1
        at = _append(out, at, 4 + index, 3)
        at = _append(out, at, piece - 1, _WIDTHS[index])
        at = _append(out, at, value, 8)
        length -= piece
    return at


@compiled()
def _append(out: UInt8Array, at: int, value: int, count: int) -> int:
    """Append the lowest `count` bits of a value, highest first; returns how many bits there are now."""
    for bit in range(count - 1, -1, -1):
        out[at >> 3] |= ((value >> bit) & 1) << (7 - (at & 7))
        at += 1
    return at
