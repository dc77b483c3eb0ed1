"""Masks as PNG pictures in base64, for clients without COCO tools: of the whole image, or cut to the mask. Called by
the pipeline in the request's own thread; one mask is drawn at a time. Knows runs of pixels; knows no model or HTTP.

Shapes: D objects of one image, M x M the mask head's output size.
"""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from typing import TypedDict

import numpy as np
from PIL import Image

from service.jit import compiled
from service.masks._runs import ColumnRuns, Int32Array, find_runs
from service.structures import Float32Array, Int64Array, UInt8Array


class Crop(TypedDict):
    """A mask cut to the smallest rectangle that holds it; one black pixel at (0, 0) if it is empty.

    `origin` is the (x, y) of the rectangle's first pixel in the image, `size` its (height, width), `png` in base64 an
    8-bit picture of 0 and 255.
    """

    origin: list[int]
    size: list[int]
    png: str


def encode_png(
    masks: Float32Array, boxes: Float32Array, image_size: tuple[int, int], threshold: float = 0.5
) -> list[str]:
    """Draw each mask into a black picture of the image's size; arguments and errors as in `rle.encode_rle`.

    Returns:
        For each object a 1-bit PNG in base64.
    """
    runs = find_runs(masks, boxes, image_size, threshold)
    whole = (0, 0, *image_size)
    return [_png(Image.fromarray(_draw(runs, index, whole).view(np.bool_))) for index in range(len(runs))]


def encode_crops(
    masks: Float32Array, boxes: Float32Array, image_size: tuple[int, int], threshold: float = 0.5
) -> list[Crop]:
    """Cut each mask out; arguments and errors as in `rle.encode_rle`."""
    runs = find_runs(masks, boxes, image_size, threshold)
    return [_crop(runs, index) for index in range(len(runs))]


def _crop(runs: ColumnRuns, index: int) -> Crop:
    x, y, height, width = rectangle = _rectangle(runs, index)
    png = _png(Image.fromarray(_draw(runs, index, rectangle) * np.uint8(255)))
    return {"origin": [x, y], "size": [height, width], "png": png}


def _rectangle(runs: ColumnRuns, index: int) -> tuple[int, int, int, int]:
    """The (x, y, height, width) of the smallest rectangle around an object's pixels."""
    columns, ys = runs.of(index)
    covered = np.flatnonzero(np.diff(columns))
    if not len(covered):
        return 0, 0, 1, 1
    x, y = int(runs.first_x[index] + covered[0]), int(ys.min())
    return x, y, int(ys.max()) - y, int(covered[-1] - covered[0]) + 1


def _draw(runs: ColumnRuns, index: int, rectangle: tuple[int, int, int, int]) -> UInt8Array:
    x, y, height, width = rectangle
    columns, ys = runs.of(index)
    pixels = np.zeros((height, width), np.uint8)
    _fill(columns, ys - np.int32(y), int(runs.first_x[index]) - x, pixels)
    return pixels


@compiled()
def _fill(columns: Int64Array, ys: Int32Array, first_x: int, pixels: UInt8Array) -> None:
    for column in range(len(columns) - 1):
        for i in range(columns[column], columns[column + 1], 2):
            pixels[ys[i] : ys[i + 1], first_x + column] = 1


def _png(picture: Image.Image) -> str:
    file = BytesIO()
    picture.save(file, "PNG")
    return b64encode(file.getvalue()).decode("ascii")
