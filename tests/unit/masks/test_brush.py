"""Masks as Label Studio's brush strokes: read back by a reader of our own, written from the format's description, and
by Label Studio's own code.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.masks.brush import encode_brush
from service.structures import UInt8Array
from tests.unit.masks.cases import drawn, objects, pasted

SDK = Path(__file__).parents[3] / ".tools/label-studio-sdk"
SIZES = [(48, 64), (37, 211), (1, 1), (1, 300), (300, 1), (400, 300)]


@pytest.fixture(scope="module")
def sdk() -> Any:
    """The module of label-studio-sdk that reads and writes brush strokes."""
    path = next(SDK.glob("lib/python*/site-packages/label_studio_sdk/converter/brush.py"), None)
    if path is None:
        pytest.skip("label-studio-sdk is not installed: tests/install_tools.sh")
    spec = importlib.util.spec_from_file_location("label_studio_brush", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def decoded(rle: Iterable[int], image_size: tuple[int, int]) -> UInt8Array:
    """(H, W, 4): the picture."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    at = 0

    def read(count: int) -> int:
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    number, word_bits = read(32), read(5) + 1
    widths = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < number:
        is_run = read(1)
        length = read(widths[read(2)]) + 1
        values += [read(word_bits)] * length if is_run else [read(word_bits) for _ in range(length)]
    assert len(values) == number
    assert len(bits) - at <= 8
    return np.array(values, np.uint8).reshape(*image_size, 4)


def check(rle: UInt8Array, mask: UInt8Array) -> None:
    assert np.array_equal(decoded(rle, (mask.shape[0], mask.shape[1])), np.repeat(mask[:, :, None] * 255, 4, axis=2))


@pytest.mark.parametrize("image_size", SIZES)
def test_decoding_gives_the_pixels_of_pasting(image_size: tuple[int, int]) -> None:
    masks, boxes = objects(1, image_size)
    expected = pasted(masks, boxes, image_size)
    encoded = encode_brush(masks, boxes, image_size)
    assert len(encoded) == len(expected)
    for rle, mask in zip(encoded, expected, strict=True):
        check(rle, mask)


@settings(max_examples=40, deadline=None)
@given(
    pixels=st.integers(1, 12).flatmap(
        lambda side: st.lists(st.text("#.", min_size=side, max_size=side), min_size=side, max_size=side)
    )
)
def test_any_pattern_survives(pixels: list[str]) -> None:
    masks, boxes, size = drawn(pixels)
    [rle] = encode_brush(masks, boxes, size)
    check(rle, np.array([[pixel == "#" for pixel in row] for row in pixels], np.uint8))


@pytest.mark.parametrize("image_size", SIZES)
def test_bytes_are_those_that_label_studio_writes(sdk: Any, image_size: tuple[int, int]) -> None:
    masks, boxes = objects(2, image_size)
    for rle, mask in zip(encode_brush(masks, boxes, image_size), pasted(masks, boxes, image_size), strict=True):
        assert rle.tolist() == sdk.mask2rle(mask * np.uint8(255))
        assert np.array_equal(sdk.decode_rle(rle.tolist()).reshape(*image_size, 4)[:, :, 3], mask * 255)


def test_large_image_costs_what_its_outline_costs() -> None:
    """A run of 65536 values is the longest: a picture of 50 megapixels is 3052 of them, in 27 bits each."""
    box = np.array([[1000, 1000, 1100, 1100]], np.float32)
    [rle] = encode_brush(np.ones((1, 28, 28), np.float32), box, (5000, 10_000))
    assert len(rle) < 3052 * 27 / 8 + 2 * 104 * 4


def test_no_detections_give_nothing() -> None:
    assert encode_brush(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), (480, 640)) == []


def test_more_pixels_than_the_format_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 1073741823 pixels"):
        encode_brush(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), (2**15, 2**15))


def test_mask_of_the_whole_image_is_one_run() -> None:
    [rle] = encode_brush(np.ones((1, 28, 28), np.float32), np.array([[-90, -90, 90, 90]], np.float32), (8, 8))
    check(rle, np.ones((8, 8), np.uint8))
    assert len(rle) == (32 + 5 + 16 + 1 + 2 + 8 + 8) // 8 + 1
