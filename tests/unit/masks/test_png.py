"""Masks as pictures: the pixels of the RLE, whole or cut out."""

from __future__ import annotations

import base64
import io
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from service.masks._sparse_png import png_file, smallest_file
from service.masks.png import encode_crops, encode_png
from service.masks.rle import encode_rle
from service.structures import MaskStyle, UInt8Array
from tests.unit.masks.cases import drawn, objects


def picture(png: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(png, validate=True)))
    assert image.format == "PNG"
    return image


def pixels(png: str) -> UInt8Array:
    return np.asarray(picture(png)).astype(np.uint8)


@pytest.mark.parametrize("style", get_args(MaskStyle))
@pytest.mark.parametrize("image_size", [(90, 120), (1, 1), (1, 3000), (3000, 1)])
def test_pictures_have_the_pixels_of_the_rle(image_size: tuple[int, int], style: MaskStyle) -> None:
    masks, boxes = objects(3, image_size)
    decoded = coco.decode(encode_rle(masks, boxes, image_size, style=style)).transpose(2, 0, 1)
    for expected, whole, crop in zip(
        decoded,
        encode_png(masks, boxes, image_size, style=style),
        encode_crops(masks, boxes, image_size, style=style),
        strict=True,
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


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(1, 40), st.integers(1, 700)),
    offset=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    bits=st.sampled_from([1, 8]),
)
def test_any_picture_comes_back_as_it_was(
    seed: int, size: tuple[int, int], offset: tuple[int, int], density: float, bits: int
) -> None:
    """Also of pixels at random, which no mask has, and with black rows and columns around them."""
    inner = (np.random.default_rng(seed).random(size) < density).astype(np.uint8)
    (y, x), width = offset, size[1]
    expected = np.pad(inner, ((y, y // 2), (x, x // 3)))
    steps = np.diff(np.pad(inner, ((1, 1), (0, 0))).astype(np.int8), axis=0)
    bounds = [np.flatnonzero(steps[:, column]) + y for column in range(width)]
    columns = np.concatenate([[0], np.cumsum([len(one) for one in bounds])])
    ys = np.concatenate(bounds).astype(np.int32)
    file = png_file(columns, ys, x, (expected.shape[0], expected.shape[1]), bits_per_pixel=bits)
    found = np.asarray(Image.open(io.BytesIO(file))).astype(np.uint8)
    assert np.array_equal(found, expected * (255 if bits == 8 else 1))


@pytest.mark.parametrize("count", [*range(1, 12), *range(250, 530), 70_000])
def test_black_rows_of_any_length_come_back(count: int) -> None:
    """Runs of zeros are cut into matches, of which none may have one or two bytes."""
    for bits in (1, 8):
        file = png_file(np.array([0]), np.zeros(0, np.int32), 0, (1, count * 8 // bits), bits_per_pixel=bits)
        assert not np.asarray(Image.open(io.BytesIO(file))).any()
        assert smallest_file((1, count * 8 // bits), bits_per_pixel=bits) <= len(file)
