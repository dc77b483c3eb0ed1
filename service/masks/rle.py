"""Masks as COCO's compressed run-length encoding, the form that `pycocotools` reads and writes. Knows
runs of pixels; knows no image, model or HTTP.

Shapes: D objects of one image, M x M the mask head's output size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TypedDict

import numpy as np

from service.jit import compiled
from service.masks._runs import Int32Array, find_runs
from service.structures import Float32Array, Int64Array, MaskStyle, UInt8Array


class RLE(TypedDict):
    """One binary mask: run lengths column by column, starting with zeros, as COCO's printable characters."""

    size: list[int]
    counts: str


def encode_rle(
    masks: Float32Array,
    boxes: Float32Array,
    image_size: tuple[int, int],
    threshold: float = 0.5,
    *,
    style: MaskStyle = "torchvision",
) -> list[RLE]:
    """Encode the pixels of `paste_masks_in_image(masks, boxes, image_size) >= threshold`, one mask after the other.

    Args:
        masks: (D, M, M) float32 probabilities, each spread over its box.
        boxes: (D, 4) float32, in pixels of the image; may reach outside.
        image_size: (height, width).
        threshold: above 0, at most 1.
        style: whose `paste_masks_in_image` to follow.

    Returns:
        For each object the result of `pycocotools.mask.encode`, with `counts` as text.

    Raises:
        ValueError: other shapes, or a box that is not finite.
    """
    runs = find_runs(masks, boxes, image_size, threshold, style=style)
    height, width = image_size
    characters, ends = _compress(runs.first_x, runs.first_column, runs.first_y, runs.ys, height, width)
    text = characters.tobytes().decode("ascii")
    return [{"size": [height, width], "counts": text[start:end]} for start, end in pairwise([0, *ends.tolist()])]


@compiled()
def _compress(
    first_x: Int64Array, first_column: Int64Array, first_y: Int64Array, ys: Int32Array, height: int, width: int
) -> tuple[UInt8Array, Int64Array]:
    """The characters of all objects concatenated, and where each object's characters end."""
    counts = np.empty(len(ys) + 2, np.int64)
    # Five bits per character, so seven characters hold any signed 32-bit count.
    text = np.empty(7 * (len(ys) + 2 * len(first_x)), np.uint8)
    ends = np.empty(len(first_x), np.int64)
    length = 0
    for d in range(len(first_x)):
        columns = first_y[first_column[d] : first_column[d + 1] + 1]
        number = _count_runs(columns, ys, first_x[d], height, width, counts)
        length = _append_characters(counts[:number], text, length)
        ends[d] = length
    return text[:length], ends


@compiled()
def _count_runs(columns: Int64Array, ys: Int32Array, first_x: int, height: int, width: int, counts: Int64Array) -> int:
    """Fill `counts` with the lengths of zeros, ones, zeros, … and return how many there are."""
    number = 0
    position = 0
    for column in range(len(columns) - 1):
        offset = (first_x + column) * height
        for i in range(columns[column], columns[column + 1], 2):
            start, end = offset + ys[i], offset + ys[i + 1]
            if number > 0 and start == position:  # The run continues from the bottom of the previous column.
                counts[number - 1] += end - start
            else:
                counts[number] = start - position
                counts[number + 1] = end - start
                number += 2
            position = end
    if position < height * width or number == 0:
        counts[number] = height * width - position
        number += 1
    return number


@compiled()
def _append_characters(counts: Int64Array, text: UInt8Array, length: int) -> int:
    """COCO's `rleToString`: each count minus the one two before it, five bits per character, lowest first."""
    for i in range(len(counts)):
        value = counts[i] - counts[i - 2] if i > 2 else counts[i]
        more = True
        while more:
            bits = value & 31
            value >>= 5
            # The highest bit of the last character is the sign.
            more = value != -1 if bits & 16 else value != 0
            text[length] = 48 + bits + (32 if more else 0)
            length += 1
    return length
