"""TIFF: the first picture of a file, and tags that ask a decoder for too much."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import struct
import tracemalloc
import zlib
from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest

from service.errors import InvalidImageError, TooLargeError, UnsupportedImageError
from service.imaging.containers import tiff as tiff_module
from service.imaging.containers.directory import read_directory
from service.imaging.containers.jpeg import MAX_SCANS, Work, count_work
from service.imaging.containers.tiff import MAX_FILL_BYTES, MAX_JPEG_SEGMENTS, MAX_STRIPS, read_tiff
from service.imaging.decode import ImageLimits, decode_image

LONG, BYTES = 4, 7
LIMITS = ImageLimits(max_image_pixels=50_000_000)


class Memory:
    """Bytes that Python allocated."""

    peak = 0


@contextlib.contextmanager
def memory_measured() -> Iterator[Memory]:
    memory = Memory()
    tracemalloc.start()
    try:
        yield memory
        memory.peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


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


def in_parts(
    size: tuple[int, int], part: tuple[int, int] | None, parts: list[bytes], *, planes: int = 1, compression: int = 8
) -> bytes:
    """A grey or planar picture of (height, width) in strips, or tiles of (height, width); equal parts share bytes."""
    places: dict[bytes, int] = {}
    body = b""
    for one in parts:
        if one not in places:
            places[one] = 8 + len(body)
            body += one + bytes(len(one) % 2)
    arrays_at = 8 + len(body)
    body += struct.pack(f"<{len(parts)}I", *(places[one] for one in parts))
    body += struct.pack(f"<{len(parts)}I", *map(len, parts))
    rows = -(-size[0] * planes // len(parts))
    count = len(parts)
    tags = TAGS | {256: (LONG, 1, size[1]), 257: (LONG, 1, size[0]), 259: (LONG, 1, compression)}
    tags |= {277: (LONG, 1, planes), 278: (LONG, 1, rows), 284: (LONG, 1, 2 if planes > 1 else 1)}
    offsets, counts = (273, 279) if part is None else (324, 325)
    if part is not None:
        tags = {tag: value for tag, value in tags.items() if tag not in (273, 278, 279)}
        tags |= {322: (LONG, 1, part[1]), 323: (LONG, 1, part[0])}
    single = (places[parts[0]], len(parts[0]))
    tags[offsets] = (LONG, count, arrays_at) if count > 1 else (LONG, 1, single[0])
    tags[counts] = (LONG, count, arrays_at + 4 * count) if count > 1 else (LONG, 1, single[1])
    return tiff(tags, pixels=body)


def progressive(num_scans: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A grey JPEG whose last scan is repeated."""
    file = io.BytesIO()
    PIL.Image.new("L", size[::-1], 99).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * (num_scans - data.count(b"\xff\xda")) + data[-2:]


def test_strips_and_tiles_that_share_nothing_are_read() -> None:
    strips = [zlib.compress(bytes([i]) * 32) for i in range(1, 5)]
    pixels = decode_image(in_parts((16, 8), None, strips), limits=LIMITS).pixels
    assert pixels[::4, 0, 0].tolist() == [1, 2, 3, 4]
    tiles = [zlib.compress(bytes([i]) * 256) for i in range(1, 5)]
    pixels = decode_image(in_parts((20, 20), (16, 16), tiles), limits=LIMITS).pixels
    assert pixels[::16, ::16, 0].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("planes", [1, 3])
def test_strips_that_share_their_data_are_refused(planes: int) -> None:
    """A megabyte that is slow to decode would be decoded for each of thousands of strips."""
    slow = b"\x78\x9c" + b"\0\0\0\xff\xff" * 2000 + zlib.compress(bytes(8))[2:]
    with pytest.raises(InvalidImageError, match="overlap"):
        read_tiff(in_parts((1000, 8), None, [slow] * 1000 * planes, planes=planes))


def test_tiles_that_share_their_data_are_refused() -> None:
    with pytest.raises(InvalidImageError, match="overlap"):
        read_tiff(in_parts((256, 256), (16, 16), [zlib.compress(os.urandom(256))] * 256))


def test_tiles_that_reach_far_beyond_the_picture_are_refused() -> None:
    """33 KB that stand for 34 gigapixels, of which 5 megapixels are the picture."""
    tile = zlib.compress(bytes(1 << 24))
    with pytest.raises(TooLargeError, match="reach far beyond"):
        read_tiff(in_parts((164, 32_768), (1 << 20, 16), [tile] * 2048))


def test_raw_strips_beyond_the_picture_are_refused() -> None:
    """Pillow goes through as many as are listed."""
    with pytest.raises(TooLargeError, match="reach far beyond"):
        read_tiff(tiff(TAGS | {256: (LONG, 1, 30_000), 257: (LONG, 1, 200), 278: (LONG, 1, 200), 273: (LONG, 9, 8)}))


def test_strips_of_unknown_length_are_refused() -> None:
    """libtiff would take the rest of the file for each."""
    data = in_parts((16, 8), None, [zlib.compress(bytes([i]) * 32) for i in range(4)])
    with pytest.raises(InvalidImageError, match="does not say how long"):
        read_tiff(data.replace(struct.pack("<HH", 279, LONG), struct.pack("<HH", 280, LONG)))


@pytest.mark.parametrize("compression", [3, 4, 5, 8, 32773])
def test_far_more_code_than_pixels_is_refused(compression: int) -> None:
    with pytest.raises(InvalidImageError, match="coded bytes for 64 bytes"):
        read_tiff(in_parts((8, 8), None, [bytes(2_000_000)], compression=compression))


@pytest.mark.parametrize("tag", [256, 257, 259, 262, 274, 277, 284, 317, 322])
def test_of_a_tag_with_a_million_values_one_is_read_and_kept(tag: int) -> None:
    shorts = struct.pack("<H", 2) * 1_000_000
    with memory_measured() as memory:
        try:
            kept = read_directory(read_tiff(tiff(TAGS | {tag: (3, 1_000_000, 8)}, pixels=shorts)).pixel_data).entries
        except (InvalidImageError, UnsupportedImageError):
            kept = {}
    assert all(entry.count == 1 for entry in kept.values())
    assert memory.peak < 10_000_000, "three copies of the file, and no list of a million numbers"


def test_a_jpeg_in_a_tiff_may_have_as_many_scans_as_a_jpeg() -> None:
    read_tiff(in_parts((64, 64), None, [progressive(MAX_SCANS)], compression=7))
    with pytest.raises(InvalidImageError, match=f"{MAX_SCANS + 1} scans"):
        read_tiff(in_parts((64, 64), None, [progressive(MAX_SCANS + 1)], compression=7))
    tiles = [progressive(3), progressive(MAX_SCANS + 1)]
    with pytest.raises(InvalidImageError, match=f"{MAX_SCANS + 1} scans"):
        read_tiff(in_parts((64, 128), (64, 64), tiles, compression=7))


@pytest.mark.parametrize("tag", [259, 273, 279])
@pytest.mark.parametrize("value_type", [6, 7, 8, 9, 11])
def test_a_tag_of_another_type_hides_nothing_that_libtiff_would_read(tag: int, value_type: int) -> None:
    whole = in_parts((64, 64), None, [progressive(MAX_SCANS + 1)], compression=7)
    as_long = struct.pack("<HH", tag, LONG)
    assert whole.count(as_long) == 1
    with pytest.raises(InvalidImageError):
        read_tiff(whole.replace(as_long, struct.pack("<HH", tag, value_type)))


def test_numbers_may_be_signed_but_not_negative() -> None:
    signed = 9
    read_tiff(tiff(TAGS | {256: (signed, 1, 2)}))
    with pytest.raises(InvalidImageError, match="negative"):
        read_tiff(tiff(TAGS | {279: (signed, 1, 0xFFFFFFFF)}))


def test_fill_bytes_of_a_jpeg_in_a_tiff_are_counted() -> None:
    data = progressive(3)
    filled = data[:-2] + b"\xff" * (MAX_FILL_BYTES + 1) + data[-2:]
    with pytest.raises(InvalidImageError, match="fill bytes"):
        read_tiff(in_parts((64, 64), None, [filled], compression=7))


def test_of_several_jpegs_without_a_length_none_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 KB whose 8000 strips are at the same 3900 segments took 15 s; libtiff reads no strip without a length."""
    searched: list[int] = []

    def counted(data: bytes) -> Work:
        searched.append(len(data))
        return count_work(data)

    monkeypatch.setattr(tiff_module, "count_work", counted)
    offsets, lengths = struct.pack("<8000I", *[8 + 64_000] * 8000), bytes(32_000)
    body = offsets + lengths + b"\xff\xd8" + b"\xff\xe1\0\2" * 3900
    tags = {256: (LONG, 1, 16), 257: (LONG, 1, 8000), 259: (LONG, 1, 7), 278: (LONG, 1, 1)}
    read_tiff(tiff(TAGS | tags | {273: (LONG, 8000, 8), 279: (LONG, 8000, 8 + 32_000)}, pixels=body))
    assert searched == [0] * 8000


def test_segments_of_the_jpegs_in_a_tiff_are_counted_together() -> None:
    parts = [b"\xff\xd8" + b"\xff\xe1\0\2" * 3900 + b"%d" % number for number in range(40)]
    with pytest.raises(InvalidImageError, match=f"over {MAX_JPEG_SEGMENTS} segments"):
        read_tiff(in_parts((1000, 1000), None, parts, compression=7))


@pytest.mark.parametrize("tag", [258, 320, 338, 529])
def test_tags_of_the_pixels_that_are_longer_than_any_palette_are_refused(tag: int) -> None:
    with pytest.raises(InvalidImageError, match=f"tag {tag} has 600000 bytes"):
        read_tiff(tiff(TAGS | {tag: (3, 300_000, 8)}, pixels=b"\x08\0" * 300_000))


def test_libtiff_writes_nothing_to_standard_error_and_its_lines_are_counted(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Noise as a fax: an error in nearly every row."""
    noise = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    fax = in_parts((2000, 160), None, [noise], compression=3)
    fax = fax.replace(struct.pack("<HHII", 258, LONG, 1, 8), struct.pack("<HHII", 258, LONG, 1, 1))
    with caplog.at_level(logging.DEBUG), contextlib.suppress(InvalidImageError):
        decode_image(fax, limits=LIMITS)
    assert capfd.readouterr().err == ""
    [lines] = [vars(record)["fields"]["lines"] for record in caplog.records if record.name == "service.imaging.decode"]
    assert lines > 1000


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
