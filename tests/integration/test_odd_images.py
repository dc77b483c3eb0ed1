"""Pictures as the world sends them: odd ones are read, broken ones are refused with their own message, and good
requests go on unharmed meanwhile.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import psutil
import pytest
from PIL.Image import Transpose

from tests.fakes import picture
from tests.integration.conftest import Live
from tests.integration.test_errors import assert_problem, good_load

RED = (204, 0, 0)  # mean red 0.8: the score of the fake model's cat


def encoded(image: PIL.Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def animation(image_format: str) -> bytes:
    """A first frame to be read, a second one to be left alone."""
    first, second = PIL.Image.new("RGB", (64, 48), RED), PIL.Image.new("RGB", (64, 48), (0, 0, 0))
    return encoded(first, image_format, save_all=True, append_images=[second])


def palette_with_transparency() -> bytes:
    image = PIL.Image.new("P", (64, 48), 1)
    image.putpalette([0, 0, 0, *RED])
    return encoded(image, "PNG", transparency=0)


def png_with_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + picture()[33:]


def png_with_wrong_crc() -> bytes:
    data = bytearray(picture())
    data[29] ^= 0xFF  # the first byte of the header's checksum
    return bytes(data)


READABLE: dict[str, Callable[[], bytes]] = {
    "cmyk": lambda: encoded(PIL.Image.new("CMYK", (64, 48), (51, 255, 255, 0)), "JPEG"),
    "16 bits": lambda: encoded(PIL.Image.new("I;16", (64, 48), 204 * 257), "PNG"),
    "grey": lambda: encoded(PIL.Image.new("L", (64, 48), 204), "JPEG"),
    "grey with alpha": lambda: encoded(PIL.Image.new("LA", (64, 48), (204, 255)), "PNG"),
    "rgba": lambda: encoded(PIL.Image.new("RGBA", (64, 48), (*RED, 255)), "PNG"),
    "palette with transparency": palette_with_transparency,
    "animated gif": lambda: animation("GIF"),
    "animated webp": lambda: animation("WebP"),
}


@pytest.mark.parametrize("kind", READABLE)
def test_odd_picture_is_read(live: Live, kind: str) -> None:
    with good_load(live):
        answer = live.detect(READABLE[kind](), "application/octet-stream").json()
    assert answer["image"] == {"width": 64, "height": 48, "orientation_applied": False}
    assert answer["detections"][0]["score"] == pytest.approx(0.8, abs=0.02)


def test_smallest_picture_is_read(live: Live) -> None:
    answer = live.detect(picture(red=204, height=1, width=1)).json()
    assert answer["detections"][1]["box"] == [0, 0, 1, 1]


BROKEN: dict[str, tuple[Any, ...]] = {
    "truncated jpeg": (lambda: picture(image_format="JPEG")[:-100], 422, "invalid_image", "JPEG"),
    "png with a wrong checksum": (png_with_wrong_crc, 422, "invalid_image", "PNG"),
    "40000 x 40000 in the header": (lambda: png_with_header(40_000, 40_000), 413, "too_large", "40000"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_image", "JPEG"),
    "one byte": (lambda: b"\xff", 415, "unsupported_image", "JPEG"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_picture_gets_its_own_answer_and_harms_no_other(live: Live, kind: str) -> None:
    make, *expected = BROKEN[kind]
    with good_load(live):
        response = live.detect(make(), "application/octet-stream")
    assert_problem(response, *expected)


def test_huge_header_costs_no_memory(live: Live) -> None:
    live.detect(png_with_header(40_000, 40_000))
    before = psutil.Process().memory_info().rss
    for _ in range(20):
        live.detect(png_with_header(40_000, 40_000))
    assert psutil.Process().memory_info().rss - before < 20_000_000


def test_image_over_the_pixel_limit_is_refused_and_one_at_it_read(serve: Callable[..., Live]) -> None:
    live = serve(max_image_pixels=64 * 48)
    assert live.detect(picture(height=48, width=64)).status_code == 200
    assert_problem(live.detect(picture(height=48, width=65)), 413, "too_large", "3072")


# How an upright picture is stored so that this orientation makes it upright again.
STORED = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_in_the_frame_of_the_upright_picture(live: Live, orientation: int) -> None:
    upright = PIL.Image.new("RGB", (64, 48), RED)
    upright.paste((0, 255, 0), (16, 8, 32, 24))
    stored = upright.transpose(STORED[orientation]) if orientation in STORED else upright
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    answer = live.detect(encoded(stored, "JPEG", exif=exif, quality=95, subsampling=0), "image/jpeg").json()
    assert answer["image"] == {"width": 64, "height": 48, "orientation_applied": orientation != 1}
    assert answer["detections"][1]["box"] == [16, 8, 32, 24]


def test_12_bits_in_a_16_bit_file_are_stretched_if_asked_and_the_answer_says_so(live: Live) -> None:
    camera = PIL.Image.fromarray(np.full((48, 64), 4095, np.uint16))
    camera.putpixel((0, 0), 0)
    dark = live.detect(encoded(camera, "PNG")).json()
    bright = live.detect(encoded(camera, "PNG"), intensity="stretch").json()
    assert dark["image"] == {"width": 64, "height": 48, "orientation_applied": False}
    assert bright["image"] == dark["image"] | {"intensity": "stretch"}
    # The fake model scores by the mean red.
    assert max(one["score"] for one in dark["detections"]) < 0.1
    assert max(one["score"] for one in bright["detections"]) > 0.99
