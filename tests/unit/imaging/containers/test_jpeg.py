"""JPEG segments: what is kept, and the two ways to waste a decoder's time."""

from __future__ import annotations

import io
import struct

import numpy as np
import PIL.Image
import pytest

from service.errors import InvalidImageError, TooLargeError
from service.imaging.containers.jpeg import MAX_SCANS, MAX_SEGMENTS, check_scans, read_jpeg
from service.imaging.decode import ImageLimits, decode_image
from service.structures import UInt8Array


def jpeg(**options: object) -> bytes:
    file = io.BytesIO()
    PIL.Image.linear_gradient("L").convert("RGB").save(file, "JPEG", **options)
    return file.getvalue()


def pixels(data: bytes) -> UInt8Array:
    return decode_image(data, limits=ImageLimits(max_image_pixels=1_000_000)).pixels


def with_scans(num_scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = jpeg(progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * (num_scans - data.count(b"\xff\xda")) + data[-2:]


def test_metadata_are_left_out_and_pixels_stay() -> None:
    large = jpeg(comment=b"a" * 60_000, exif=b"Exif\0\0" + b"b" * 60_000, icc_profile=b"c" * 200_000)
    container = read_jpeg(large)
    assert container.image_size == (256, 256)
    assert len(container.pixel_data) < 10_000 < 300_000 < len(large)
    assert np.array_equal(pixels(large), pixels(jpeg()))


@pytest.mark.timeout(10)
def test_fill_bytes_are_left_out() -> None:
    """Pillow takes 2 µs for each before a header segment, and libjpeg 0.3 µs within a scan."""
    fill = b"\xff" * 3_000_000
    plain = jpeg()
    for filled in (plain[:2] + fill + plain[2:], plain[:-2] + fill + plain[-2:]):
        assert len(read_jpeg(filled).pixel_data) <= len(plain) + 1
        assert np.array_equal(pixels(filled), pixels(plain))
    with pytest.raises(InvalidImageError, match="before the first scan"):
        read_jpeg(b"\xff\xd8" + fill)


def test_fill_bytes_before_restart_markers_do_not_change_the_picture() -> None:
    data = jpeg(restart_marker_rows=4)
    filled = data.replace(b"\xff\xd1", b"\xff\xff\xff\xff\xd1")
    assert len(filled) > len(data)
    assert np.array_equal(pixels(filled), pixels(data))


def test_scans_are_counted() -> None:
    assert read_jpeg(with_scans(MAX_SCANS)).image_size == (256, 256)
    with pytest.raises(InvalidImageError, match=f"hold {MAX_SCANS + 1} scans"):
        read_jpeg(with_scans(MAX_SCANS + 1))


def test_the_larger_the_picture_the_fewer_scans_beyond_the_usual_ten() -> None:
    check_scans(10, 50_000_000)
    check_scans(14, 50_000_000)
    check_scans(MAX_SCANS, 9_000_000)
    with pytest.raises(TooLargeError, match="15 scans of 50000000 pixels; of a JPEG this large we read up to 14"):
        check_scans(15, 50_000_000)
    check_scans(18, 50_000_000, num_components=4)  # what libjpeg itself writes for ink


def test_of_many_exif_segments_the_first_counts_and_no_other_is_read() -> None:
    def exif(orientation: int) -> bytes:
        block = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 3, 1, orientation)
        return b"\xff\xe1" + struct.pack(">H", 2 + len(block)) + block

    data = jpeg()
    assert read_jpeg(data[:2] + exif(6) + exif(3) * 600 + data[2:]).orientation == 6


def test_scans_of_thumbnails_and_of_what_follows_the_image_do_not_count() -> None:
    """Phones append further pictures and films."""
    data = jpeg()
    appended = data + jpeg(progressive=True) * 10
    thumbnails = data[:2] + b"\xff\xe2\x03\xe8" + b"\xff\xda\0\2" * 249 + b"\0\0" + data[2:]
    assert np.array_equal(pixels(appended), pixels(data))
    assert np.array_equal(pixels(thumbnails), pixels(data))


def test_segments_are_counted() -> None:
    data = jpeg()
    with pytest.raises(InvalidImageError, match=f"over {MAX_SEGMENTS} segments"):
        read_jpeg(data[:2] + b"\xff\xfe\0\2" * MAX_SEGMENTS + data[2:])


def test_two_frame_headers_are_refused() -> None:
    """Pillow would believe the second, libjpeg the first."""
    data = jpeg()
    start = data.index(b"\xff\xc0")
    header = data[start : start + 19]
    with pytest.raises(InvalidImageError, match="two frame headers"):
        read_jpeg(data[:start] + header + data[start:])


@pytest.mark.parametrize("length", [b"\0\0", b"\0\1", b"\xff\xff"])
def test_a_segment_of_impossible_length_is_refused(length: bytes) -> None:
    with pytest.raises(InvalidImageError, match="within a segment"):
        read_jpeg(b"\xff\xd8\xff\xe0" + length + bytes(100))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"keep_rgb": True}])
def test_what_libjpeg_writes_as_progressive_is_read_at_any_size(mode: str, options: dict[str, object]) -> None:
    file = io.BytesIO()
    PIL.Image.new(mode, (64, 64)).save(file, "JPEG", progressive=True, **options)
    num_scans = read_jpeg(file.getvalue()).num_passes
    check_scans(num_scans, 50_000_000, num_components=len(mode))
