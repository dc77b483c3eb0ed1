"""Orientation from EXIF blocks that are written by hand."""

from __future__ import annotations

import struct

import pytest

from service.imaging.containers.exif import read_orientation

SHORT, ASCII, LONG = 3, 2, 4


def exif(*, value_type: int = SHORT, count: int = 1, value: bytes = b"\6\0\0\0", order: str = "<") -> bytes:
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    entry = struct.pack(order + "HHI", 0x0112, value_type, count) + value
    return header + struct.pack(order + "H", 1) + entry + bytes(4)


def test_orientation_is_read_in_both_byte_orders() -> None:
    assert read_orientation(exif()) == 6
    assert read_orientation(exif(order=">", value=b"\0\6\0\0")) == 6


def test_a_long_is_as_good_as_a_short() -> None:
    assert read_orientation(exif(value_type=LONG)) == 6


@pytest.mark.parametrize(
    "block",
    [
        exif(value_type=ASCII, count=2, value=b"6\0\0\0"),
        exif(value=b"\xff\xff\0\0"),
        exif(value=b"\0\0\0\0"),
        exif(value=b"\x09\0\0\0"),
        exif(count=0),
        exif(count=1 << 31, value=b"\x08\0\0\0"),
        exif(value_type=99),
        exif()[:-8],
        exif()[:6],
        b"",
        b"no EXIF at all",
    ],
    ids=[
        "string",
        "65535",
        "0",
        "9",
        "no value",
        "outside",
        "unknown type",
        "cut entry",
        "cut header",
        "empty",
        "text",
    ],
)
def test_anything_else_means_upright(block: bytes) -> None:
    assert read_orientation(block) == 1
