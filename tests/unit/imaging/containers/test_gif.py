"""GIF blocks: the first frame and its transparency, nothing else."""

from __future__ import annotations

import struct

import pytest

from service.errors import InvalidImageError
from service.imaging.containers.gif import MAX_EXTENSION_BLOCKS, read_gif
from service.imaging.decode import ImageLimits, decode_image

# Two colours, red and blue; one frame of two pixels, coded with 2-bit codes: clear, 0, 1, end.
SCREEN = b"GIF89a" + struct.pack("<HHBBB", 2, 1, 0x80, 0, 0) + b"\xff\0\0" + b"\0\0\xff"
FRAME = b"," + struct.pack("<HHHHB", 0, 0, 2, 1, 0) + b"\2\2\x44\x0a\0"
END = b";"


def extension(label: int, *blocks: bytes) -> bytes:
    return bytes([0x21, label]) + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def pixels(data: bytes) -> object:
    return decode_image(data, limits=ImageLimits(max_image_pixels=1000)).pixels.tolist()


def test_the_first_frame_is_read() -> None:
    assert pixels(SCREEN + FRAME + END) == [[[255, 0, 0], [0, 0, 255]]]


def test_extensions_before_the_frame_are_left_out_but_for_its_transparency() -> None:
    comment = extension(0xFE, b"a" * 255, b"b")
    control = extension(0xF9, b"\x0d\x10\x27\1")  # colour 1 is transparent; disposal 3, 100 seconds
    data = SCREEN + comment + control + comment + FRAME + END
    assert read_gif(data).pixel_data == SCREEN + extension(0xF9, b"\1\0\0\1") + FRAME + END
    assert pixels(data) == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("comment", [extension(0xFE), extension(0xFE, b"a")])
def test_extension_blocks_are_counted(comment: bytes) -> None:
    with pytest.raises(InvalidImageError, match="extension blocks"):
        read_gif(SCREEN + comment * (MAX_EXTENSION_BLOCKS + 1) + FRAME + END)


def test_the_blocks_of_one_extension_are_counted_while_they_are_read() -> None:
    """The bound is met after 65,536 of a million blocks: it is named although the file has no end."""
    with pytest.raises(InvalidImageError, match="extension blocks"):
        read_gif(SCREEN + b"\x21\xfe" + b"\1a" * 1_000_000)


def test_a_frame_beyond_the_screen_enlarges_it() -> None:
    """So that the pixel limit sees the size that the decoder will make."""
    far = b"," + struct.pack("<HHHHB", 60_000, 30_000, 2, 1, 0) + FRAME[10:]
    assert read_gif(SCREEN + far + END).image_size == (30_001, 60_002)


def test_a_gif_without_a_picture_is_refused() -> None:
    with pytest.raises(InvalidImageError, match="no picture"):
        read_gif(SCREEN + extension(0xFE, b"only words") + END)
