"""Masks as bitmaps: the very pixels, in the smallest rectangle."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from service.masks.bitmap import Bitmap, encode_bitmaps
from service.structures import UInt8Array
from tests.unit.masks.cases import drawn, objects, pasted


def pixels(bitmap: Bitmap) -> UInt8Array:
    height, width = bitmap["size"]
    packed = np.frombuffer(base64.b64decode(bitmap["bits"]), np.uint8)
    return np.unpackbits(packed, count=height * width).reshape(height, width)


@pytest.mark.parametrize("image_size", [(48, 64), (37, 211), (1, 1), (1, 300), (300, 1)])
def test_bitmaps_are_the_pixels_of_pasting(image_size: tuple[int, int]) -> None:
    masks, boxes = objects(3, image_size)
    for bitmap, expected in zip(
        encode_bitmaps(masks, boxes, image_size), pasted(masks, boxes, image_size), strict=True
    ):
        (x, y), (height, width) = bitmap["origin"], bitmap["size"]
        canvas = np.zeros(image_size, np.uint8)
        canvas[y : y + height, x : x + width] = pixels(bitmap)
        assert np.array_equal(canvas, expected)


def test_rectangle_is_the_smallest() -> None:
    [bitmap] = encode_bitmaps(*drawn(["....", ".#..", ".##.", "...."]))
    assert (bitmap["origin"], bitmap["size"]) == ([1, 1], [2, 2])
    assert pixels(bitmap).tolist() == [[1, 0], [1, 1]]


def test_empty_mask_has_no_pixels() -> None:
    assert encode_bitmaps(*drawn(["..", ".."])) == [{"origin": [0, 0], "size": [0, 0], "bits": ""}]
