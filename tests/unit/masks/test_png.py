"""Masks as pictures: the pixels of the RLE, whole or cut out."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from service.masks.png import encode_crops, encode_png
from service.masks.rle import encode_rle
from service.structures import UInt8Array
from tests.unit.masks.cases import drawn, objects


def picture(png: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(png, validate=True)))
    assert image.format == "PNG"
    return image


def pixels(png: str) -> UInt8Array:
    return np.asarray(picture(png)).astype(np.uint8)


@pytest.mark.parametrize("image_size", [(90, 120), (1, 1), (1, 3000), (3000, 1)])
def test_pictures_have_the_pixels_of_the_rle(image_size: tuple[int, int]) -> None:
    masks, boxes = objects(3, image_size)
    decoded = coco.decode(encode_rle(masks, boxes, image_size)).transpose(2, 0, 1)
    for expected, whole, crop in zip(
        decoded, encode_png(masks, boxes, image_size), encode_crops(masks, boxes, image_size), strict=True
    ):
        assert np.array_equal(pixels(whole), expected)
        (x, y), (height, width) = crop["origin"], crop["size"]
        pasted = np.zeros_like(expected)
        pasted[y : y + height, x : x + width] = pixels(crop["png"]) // 255
        assert np.array_equal(pasted, expected)


def test_crop_is_the_smallest_rectangle_around_the_mask() -> None:
    [crop] = encode_crops(*drawn([".....", "..##.", "..#..", "..#..", "....."]))
    assert (crop["origin"], crop["size"]) == ([2, 1], [3, 2])
    assert pixels(crop["png"]).tolist() == [[255, 255], [255, 0], [255, 0]]


def test_whole_picture_has_one_bit_a_pixel() -> None:
    [png] = encode_png(*drawn(["#.", ".."]))
    assert picture(png).mode == "1"


def test_empty_mask_is_one_black_pixel() -> None:
    [crop] = encode_crops(*drawn(["..", ".."]))
    assert (crop["origin"], crop["size"]) == ([0, 0], [1, 1])
    assert pixels(crop["png"]).tolist() == [[0]]
