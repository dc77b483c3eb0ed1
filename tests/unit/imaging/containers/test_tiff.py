"""TIFF: the first picture of a file, and tags that ask a decoder for too much."""

from __future__ import annotations

import io
import struct

import numpy as np
import PIL.Image
import pytest

from service.errors import InvalidImageError, TooLargeError, UnsupportedImageError
from service.imaging.containers.directory import read_directory
from service.imaging.containers.tiff import MAX_STRIPS, read_tiff

LONG, BYTES = 4, 7


def tiff(tags: dict[int, tuple[int, int, int]], *, pixels: bytes = b"\1\2\3\4") -> bytes:
    """A file with the pixels at offset 8 and one directory; tags are (type, count, value or offset)."""
    entries = b"".join(struct.pack("<HHII", tag, *rest) for tag, rest in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


# 2 x 2 grey pixels of 8 bits, uncompressed, in one strip.
TAGS = {
    **{256: (LONG, 1, 2), 257: (LONG, 1, 2), 258: (LONG, 1, 8), 259: (LONG, 1, 1), 262: (LONG, 1, 1)},
    **{273: (LONG, 1, 8), 277: (LONG, 1, 1), 278: (LONG, 1, 2), 279: (LONG, 1, 4)},
}


def test_the_first_picture_is_kept_with_only_the_tags_of_its_pixels() -> None:
    text, orientation = (BYTES, 4, 0), (LONG, 1, 6)
    container = read_tiff(tiff(TAGS | {270: text, 274: orientation, 34665: (LONG, 1, 8)}))
    assert container.image_size == (2, 2)
    assert container.orientation == 6
    assert set(read_directory(container.pixel_data).entries) == set(TAGS)
    assert np.asarray(PIL.Image.open(io.BytesIO(container.pixel_data))).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("big_tiff", [False, True])
def test_of_several_pages_the_first_is_kept(big_tiff: bool) -> None:
    pages = [PIL.Image.new("RGB", (4, 3), colour) for colour in ("red", "lime")]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:], big_tiff=big_tiff, compression="tiff_lzw")
    kept = PIL.Image.open(io.BytesIO(read_tiff(file.getvalue()).pixel_data))
    assert getattr(kept, "n_frames", 1) == 1
    assert np.array_equal(np.asarray(kept), np.asarray(pages[0]))


def test_tags_that_all_point_at_the_same_megabytes_are_not_copied() -> None:
    data = tiff(TAGS | dict.fromkeys(range(40000, 44000), (BYTES, 1000000, 8)), pixels=bytes(1_000_000))
    assert len(read_tiff(data).pixel_data) < len(data) + 1000


def test_tags_that_are_needed_may_not_be_larger_than_the_file() -> None:
    with pytest.raises(InvalidImageError, match="larger than its data"):
        read_tiff(tiff(TAGS | dict.fromkeys((320, 347), (BYTES, 600000, 8)), pixels=bytes(1_000_000)))


def test_strips_and_tiles_are_counted() -> None:
    with pytest.raises(TooLargeError, match=f"over {MAX_STRIPS} strips"):
        read_tiff(tiff(TAGS | {273: (LONG, MAX_STRIPS + 1, 8)}, pixels=bytes(4 * MAX_STRIPS + 4)))


def test_a_tile_is_bounded_even_where_the_picture_is_small() -> None:
    with pytest.raises(TooLargeError, match="a tile of the TIFF"):
        read_tiff(tiff(TAGS | {322: (LONG, 1, 65_536), 323: (LONG, 1, 65_536)}))


def test_a_compression_that_we_do_not_read_is_unsupported() -> None:
    lzma = 34925
    with pytest.raises(UnsupportedImageError, match="compression 34925"):
        read_tiff(tiff(TAGS | {259: (LONG, 1, lzma)}))


def test_a_missing_size_is_named() -> None:
    with pytest.raises(InvalidImageError, match="lack tag 257"):
        read_tiff(tiff({tag: value for tag, value in TAGS.items() if tag != 257}))
