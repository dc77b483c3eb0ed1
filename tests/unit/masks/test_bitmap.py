"""Masks as bitmaps: the very pixels, in the smallest rectangle."""

from __future__ import annotations

import numpy as np
import pytest

from service.masks import bitmap as module
from service.masks.bitmap import Bitmap, find_bitmaps
from service.structures import UInt8Array
from tests.unit.masks.cases import drawn, objects, pasted


def pixels(bitmap: Bitmap) -> UInt8Array:
    text = b"".join(bitmap.write())
    return np.array(text.split(b",")[:-1], np.uint8).reshape(bitmap.height, bitmap.width)


@pytest.mark.parametrize("image_size", [(48, 64), (37, 211), (1, 1), (1, 300), (300, 1)])
def test_bitmaps_are_the_pixels_of_pasting(image_size: tuple[int, int]) -> None:
    masks, boxes = objects(3, image_size)
    for bitmap, expected in zip(find_bitmaps(masks, boxes, image_size), pasted(masks, boxes, image_size), strict=True):
        canvas = np.zeros(image_size, np.uint8)
        canvas[bitmap.y : bitmap.y + bitmap.height, bitmap.x : bitmap.x + bitmap.width] = pixels(bitmap)
        assert np.array_equal(canvas, expected)


def test_large_bitmaps_are_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, box = np.ones((1, 28, 28), np.float32), np.array([[0, 0, 50, 60]], np.float32)
    [bitmap] = find_bitmaps(masks, box, (60, 50))
    whole = b"".join(bitmap.write())
    monkeypatch.setattr(module, "_PIECE_PIXELS", 7 * bitmap.width)
    pieces = list(bitmap.write())
    assert {len(piece) for piece in pieces[:-1]} == {2 * 7 * bitmap.width}
    assert b"".join(pieces) == whole


def test_rectangle_is_the_smallest() -> None:
    [bitmap] = find_bitmaps(*drawn(["....", ".#..", ".##.", "...."]))
    assert (bitmap.x, bitmap.y, bitmap.width, bitmap.height) == (1, 1, 2, 2)
    assert list(bitmap.write()) == [b"1,0,1,1,"]


def test_empty_mask_has_no_pixels() -> None:
    [bitmap] = find_bitmaps(*drawn(["..", ".."]))
    assert (bitmap.width, bitmap.height, list(bitmap.write())) == (0, 0, [])
