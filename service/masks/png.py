"""Masks as PNG pictures in base64, for clients without COCO tools: of the whole image, or cropped to the mask. The cost
of both is proportional to the mask's outline, not the picture's area.

Shapes: D objects of one image, M x M the mask head's output size.
"""

from __future__ import annotations

from base64 import b64encode
from typing import TypedDict

import numpy as np

from service.masks._runs import ColumnRuns, find_runs
from service.masks._sparse_png import png_file, smallest_file
from service.structures import Float32Array, MaskStyle


class Crop(TypedDict):
    """A mask cut to the smallest rectangle that holds it; one black pixel at (0, 0) if it is empty.

    `origin` is the (x, y) of the rectangle's first pixel in the image, `size` its (height, width), and `png` an 8-bit
    picture of 0 and 255 in base64.
    """

    origin: list[int]
    size: list[int]
    png: str


def encode_png(
    masks: Float32Array,
    boxes: Float32Array,
    image_size: tuple[int, int],
    *,
    style: MaskStyle = "torchvision",
) -> list[str]:
    """Draw each mask, at the threshold 0.5, into a black picture of the image's size; arguments and errors as in
    `rle.encode_rle`.

    Returns:
        A 1-bit PNG in base64 for each object.
    """
    runs = find_runs(masks, boxes, image_size, style=style)
    pictures = []
    for index in range(len(runs)):
        columns, ys = runs.of(index)
        pictures.append(_base64(png_file(columns, ys, int(runs.first_x[index]), image_size, bits_per_pixel=1)))
    return pictures


def smallest_png(image_size: tuple[int, int]) -> int:
    """The minimum number of characters that `encode_png` returns for a mask of an image of this size."""
    return smallest_file(image_size, bits_per_pixel=1) * 4 // 3


def encode_crops(
    masks: Float32Array,
    boxes: Float32Array,
    image_size: tuple[int, int],
    *,
    style: MaskStyle = "torchvision",
) -> list[Crop]:
    """Crop each mask, at the threshold 0.5; arguments and errors as in `rle.encode_rle`."""
    runs = find_runs(masks, boxes, image_size, style=style)
    return [_crop(runs, index) for index in range(len(runs))]


def _crop(runs: ColumnRuns, index: int) -> Crop:
    x, y, height, width = runs.rectangle(index)
    # A PNG has at least one pixel.
    height, width = max(height, 1), max(width, 1)
    columns, ys = runs.of(index)
    left = int(runs.first_x[index]) - x
    png = png_file(columns, ys - np.int32(y), left, (height, width), bits_per_pixel=8)
    return {"origin": [x, y], "size": [height, width], "png": _base64(png)}


def _base64(file: bytes) -> str:
    return b64encode(file).decode("ascii")
