"""JPEG (ITU T.81): a row of segments, each a marker and a length, and after each "start of scan" the coded data.

Two attacks are blocked here. Any number of `FF` fill bytes may precede a marker, and a decoder takes up to 2 µs for
each: they are removed. And a progressive file may repeat scans of a few bytes, each of which makes the decoder visit
all pixels again: scans are counted.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from service.errors import InvalidImageError, TooLargeError
from service.imaging.containers.container import Container
from service.imaging.containers.exif import read_orientation

# The usual encoders write up to 10 scans, the most eager optimisers about 20.
MAX_SCANS = 32
# Each scan beyond the usual ten visits all pixels again, at up to 5 ns per pixel. This allows one second for all of
# them.
USUAL_SCANS = 10
USUAL_SCANS_OF_INK = 18  # of four components
MAX_EXTRA_SCAN_PIXELS = 200_000_000
# Metadata comes in segments of at most 64 KiB, so large metadata needs several hundred.
MAX_SEGMENTS = 4096

_SOI = b"\xff\xd8"
_SOS, _EOI, _APP1, _APP14 = 0xDA, 0xD9, 0xE1, 0xEE
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD9))
# Besides: Huffman, arithmetic and quantisation tables, the restart interval, and the colour information of JFIF and
# Adobe.
_NEEDED = _FRAME_HEADERS | {_SOS, _EOI, 0xC4, 0xCC, 0xDB, 0xDD, 0xE0, 0xEE}

# Marker and header of a frame that is coded sequentially by Huffman's method in 8 bits, of three components that are
# Y, Cb and Cr by their numbers. The sampling of Y is 4:4:4, 4:4:0, 4:2:2, 4:2:0 or 4:1:1.
_BASELINE_FRAME = re.compile(rb"\xc0\x08.{4}\x03\x01[\x11\x12\x21\x22\x41].\x02\x11.\x03\x11.", re.DOTALL)

_FILL = re.compile(rb"\xff\xff+")
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_NOT_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # a marker after it, or fill bytes in it
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # stuffed zeros and restart markers belong to the scan


def read_jpeg(data: bytes) -> Container:
    """Read the frame header and EXIF, count the scans, and keep only the segments that make the pixels.

    `is_baseline_jpeg` holds for what cameras and most programs write: one sequential scan of Y, Cb and Cr in 8 bits,
    with an end marker. Damage within the scan cannot be seen from here.
    """
    image_size: tuple[int, int] | None = None
    orientation = 1
    has_exif = has_end = False
    is_baseline = True
    num_scans = num_components = 0
    # Views, so that possibly megabytes of data are copied only once, when they are joined.
    view = memoryview(data)
    kept: list[bytes | memoryview] = [_SOI]
    for marker, start, end, has_fill in _segments(data):
        if marker in _FRAME_HEADERS:
            if image_size is not None:
                raise InvalidImageError("the JPEG data hold two frame headers")
            height, width, num_components = struct.unpack_from(">HHB", data, start + 3)
            image_size = height, width
            is_baseline &= _BASELINE_FRAME.fullmatch(bytes([marker]) + data[start + 2 : end]) is not None
        elif marker == _SOS:
            num_scans += 1
            is_baseline &= data[start + 2 : start + 3] == b"\x03"
        elif marker == _EOI:
            has_end = True
        elif marker == _APP14 and data.startswith(b"Adobe", start + 2):
            is_baseline &= data[start + 13 : start + 14] == b"\x01"  # YCbCr
        elif marker == _APP1 and not has_exif and data.startswith(b"Exif\0\0", start + 2):
            has_exif = True  # only the first counts, as in browsers: a file may hold thousands
            orientation = read_orientation(data[start + 8 : end])
        if has_fill:
            kept += (b"\xff", _FILL.sub(b"\xff", view[start - 1 : end]))
        elif marker in _NEEDED:
            kept += (b"\xff", view[start - 1 : end])
    if image_size is None or num_scans == 0:
        raise InvalidImageError("the JPEG data end before the first scan")
    check_scans(num_scans, image_size[0] * image_size[1], num_components)
    is_baseline &= has_end and num_scans == 1
    return Container(image_size, b"".join(kept), orientation, num_passes=num_scans, is_baseline_jpeg=is_baseline)


def check_scans(num_scans: int, num_pixels: int, num_components: int = 3) -> None:
    """Limit how many times a decoder visits the pixels of a picture.

    Raises:
        InvalidImageError: more scans than any encoder writes.
        TooLargeError: more scans than usual, for this many pixels.
    """
    if num_scans > MAX_SCANS:
        raise InvalidImageError(f"the JPEG data hold {num_scans} scans; we read up to {MAX_SCANS}")
    usual = USUAL_SCANS if num_components <= 3 else USUAL_SCANS_OF_INK
    if (num_scans - usual) * num_pixels > MAX_EXTRA_SCAN_PIXELS:
        most = usual + MAX_EXTRA_SCAN_PIXELS // num_pixels
        raise TooLargeError(f"{num_scans} scans of {num_pixels} pixels; of a JPEG this large we read up to {most}")


@dataclass(frozen=True, slots=True)
class Work:
    """The work that a JPEG costs a decoder.

    Attributes:
        num_scans: how many times it visits the pixels.
        num_pixels: from the largest frame header; 0 if there is none.
        num_components: likewise; 3 for colours, 4 for ink.
        fill_bytes: how many precede markers.
        num_segments: how many segments it has.
    """

    num_scans: int
    num_pixels: int
    num_components: int
    fill_bytes: int
    num_segments: int


def count_work(data: bytes) -> Work:
    """Measure a JPEG, or tables for one, embedded in another file.

    Raises:
        InvalidImageError: an unfinished segment, or too many segments.
    """
    num_scans = num_pixels = num_components = length = num_segments = 0
    for marker, start, end, _ in _segments(data):
        length = end
        num_segments += 1
        if marker in _FRAME_HEADERS:
            height, width, components = struct.unpack_from(">HHB", data, start + 3)
            num_pixels, num_components = max(num_pixels, height * width), max(num_components, components)
        num_scans += marker == _SOS
    fill_bytes = sum(len(run.group()) - 1 for run in _FILL.finditer(data, 0, length))
    return Work(num_scans, num_pixels, num_components, fill_bytes, num_segments)


def _segments(data: bytes) -> Iterator[tuple[int, int, int, bool]]:
    """Yield (marker, where its length begins, where it ends, whether to look for fill bytes) until the image ends. A
    scan includes its coded data.
    """
    position = len(_SOI)
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, position)
        if found is None:
            return  # without an end marker pixels may be missing; the decoder will notice
        marker, position = data[found.end() - 1], found.end()
        if marker == _EOI:
            yield marker, position, position, False
            return
        if marker in _WITHOUT_LENGTH:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        start, position = position, position + length
        if length < 2 or position > len(data):
            raise InvalidImageError("the JPEG data end within a segment")
        has_fill = False
        if marker == _SOS:
            position, has_fill = _end_of_scan(data, start, position)
        yield marker, start, position, has_fill
    raise InvalidImageError(f"the JPEG data hold over {MAX_SEGMENTS} segments")


def _end_of_scan(data: bytes, start: int, coded: int) -> tuple[int, bool]:
    """Where a scan ends (its coded data begins at `coded`), and whether there may be fill bytes from `start` on.

    Nearly always the next marker directly follows the scan's data: then one pass over these bytes, most of the file,
    answers both.
    """
    first = _NOT_OF_SCAN.search(data, start)
    if first is not None and first.start() >= coded and data[first.end() - 1] != 0xFF:
        return first.start(), False
    after = _MARKER_AFTER_SCAN.search(data, coded)
    return after.start() if after is not None else len(data), True
