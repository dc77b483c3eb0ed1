"""BMP headers: both kinds, both directions, and run lengths."""

from __future__ import annotations

import struct

import pytest

from service.errors import TooLargeError
from service.imaging.containers.bmp import MAX_RLE_BYTES, read_bmp
from service.imaging.decode import ImageLimits, decode_image

GREY_PALETTE = b"".join(bytes([level, level, level, 0]) for level in range(256))


def bmp(width: int, height: int, rows: bytes, *, compression: int = 0) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + info + GREY_PALETTE + rows


def grey(data: bytes) -> object:
    return decode_image(data, limits=ImageLimits(max_image_pixels=10_000_000)).pixels[..., 0].tolist()


def test_rows_run_upwards_and_with_a_negative_height_downwards() -> None:
    rows = b"\1\2\0\0" + b"\3\4\0\0"  # padded to four bytes
    assert grey(bmp(2, 2, rows)) == [[3, 4], [1, 2]]
    assert grey(bmp(2, -2, rows)) == [[1, 2], [3, 4]]


def test_the_old_header_has_sizes_of_16_bits() -> None:
    assert read_bmp(b"BM" + bytes(12) + struct.pack("<IHHHH", 12, 300, 200, 1, 24)).image_size == (200, 300)


def test_run_lengths_are_read() -> None:
    assert grey(bmp(3, 1, b"\2\x07\1\x09\0\1", compression=1)) == [[7, 7, 9]]


def test_run_lengths_are_limited_because_they_are_decoded_slowly() -> None:
    with pytest.raises(TooLargeError, match="run-length coded BMP of"):
        read_bmp(bmp(10, 10, bytes(MAX_RLE_BYTES), compression=1))
    with pytest.raises(TooLargeError, match="and 3000 x 3000 pixels"):
        read_bmp(bmp(3000, 3000, b"", compression=2))
