"""Masks of every form become the arrays that pycocotools makes of them."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from roiserve_client import Mask
from roiserve_client.masks import decode_rle, fill_polygons
from roiserve_client.png import decode_grey_png, encode_png
from service.answers import encode
from service.imaging.decode import ImageLimits, decode_image
from service.structures import Detections, Image, Json, MaskFormat
from tests.fakes import FAKE_INFO

SIZE = (48, 64)
FORMS: tuple[MaskFormat, ...] = ("rle", "polygons", "png", "crop")


def encoded(form: MaskFormat, small: Any, box: list[float]) -> Mask:
    """A mask of 28 x 28 in its box, as the server encodes it."""
    found = Detections(np.array([box], np.float32), np.array([1]), np.array([0.9], np.float32), small[None])
    image = Image(np.zeros((*SIZE, 3), np.uint8))
    return Mask(json.loads(encode(Json(form), image, found, FAKE_INFO))[0]["mask"], SIZE)


@pytest.mark.parametrize("box", [[10, 5, 60, 45], [-20, -20, 90, 90], [0, 0, 64, 48], [5, 5, 6, 6], [80, 80, 90, 90]])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_mask(form: MaskFormat, box: list[float]) -> None:
    small = np.random.default_rng(0).random((28, 28), np.float32)
    small[:, :10] = 1
    expected = coco.decode(encoded("rle", small, box).data).astype(bool)
    mask = encoded(form, small, box)
    assert mask.form == form
    found = mask.to_numpy()
    assert (found.dtype.name, found.shape) == ("bool", SIZE)
    assert (found == expected).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_run_lengths_are_decoded_as_pycocotools_does(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    density = data.draw(st.sampled_from([0.0, 0.003, 0.5, 1.0]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    mask = np.random.default_rng(seed).random((height, width)) < density
    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    assert (decode_rle(rle) == mask).all()
    assert (decode_rle({"size": [height, width], "counts": rle["counts"].decode()}) == mask).all()


def test_long_runs_and_plain_counts_are_decoded() -> None:
    mask = np.zeros((4000, 5000), np.uint8, order="F")
    mask[3999, 4999] = 1
    rle = coco.encode(mask)
    assert (decode_rle(rle) == mask).all()
    assert (decode_rle({"size": [2, 2], "counts": [1, 2, 1]}) == [[False, True], [True, False]]).all()


@pytest.mark.parametrize("counts", ["", "1", "a", "\x7f", "0a", "ooooooooooooooo1", [5], [-1, 5]])
def test_damaged_run_lengths_are_refused(counts: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        decode_rle({"size": [2, 2], "counts": counts})


def test_slanted_polygon_is_filled_by_its_pixels_centres() -> None:
    triangle = [0, 0, 4, 0, 0, 4]
    rows = ["1110", "1100", "1000", "0000"]  # The centres on the slanted side are outside.
    assert (fill_polygons([triangle], (4, 4)) == [[one == "1" for one in row] for row in rows]).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1), (3, 5, 3), (1, 1, 4), (2, 3, 2)])
def test_pixels_are_sent_without_loss(shape: tuple[int, ...], dtype: type[np.uint8] | type[np.uint16]) -> None:
    """Checked by the server's own reader, except for transparency, which it lays over white."""
    white = 255 if dtype is np.uint8 else 65535
    pixels = np.random.default_rng(1).integers(0, white, shape, endpoint=True).astype(dtype)
    if len(shape) == 3 and shape[2] in (2, 4):
        pixels[:, :, -1] = white
    image = decode_image(encode_png(pixels), limits=ImageLimits(max_image_pixels=100))
    eight = np.round(pixels.astype(np.float64) * 255 / white).astype(np.uint8)
    colours = eight.reshape(*shape[:2], -1)
    grey = colours[:, :, :1].repeat(3, axis=2)
    expected = grey if colours.shape[2] < 3 else colours[:, :, :3]
    assert np.abs(image.pixels.astype(int) - expected).max() <= (dtype is np.uint16)


def test_grey_pictures_are_read_back() -> None:
    pixels = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
    assert (decode_grey_png(encode_png(pixels)) == pixels).all()
    with pytest.raises(ValueError, match="a PNG file"):
        decode_grey_png(b"GIF89a")
    with pytest.raises(ValueError, match="grey PNG of 1 or 8 bits"):
        decode_grey_png(encode_png(np.zeros((2, 2, 3), np.uint8)))


def test_pillows_filters_are_read_if_the_server_may_write_them() -> None:
    rows = b"\x01\x01\x01\x01" + b"\x02\x01\x01\x01" + b"\x00\x09\x08\x07"  # Sub, Up, None
    head = struct.pack(">IIBBBBB", 3, 3, 8, 0, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + b"\0\0\0\0"
        for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )
    assert decode_grey_png(file).tolist() == [[1, 2, 3], [2, 3, 4], [9, 8, 7]]
