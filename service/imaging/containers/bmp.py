"""BMP: a fixed header, then rows of pixels. Nothing to leave out."""

from __future__ import annotations

import struct

from service.errors import TooLargeError
from service.imaging.containers.container import Container

# Pillow decodes run lengths in Python, at up to 0.3 µs per byte and 0.1 µs per pixel, while other threads wait for the
# GIL.
MAX_RLE_BYTES = 1 << 20
MAX_RLE_PIXELS = 1 << 22

_OS2_HEADER_BYTES = 12
_RLE8, _RLE4 = 1, 2


def read_bmp(data: bytes) -> Container:
    """Read the size from the header. A negative height means rows from top to bottom."""
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    if header_bytes == _OS2_HEADER_BYTES:
        width, height = struct.unpack_from("<HH", data, 18)
        return Container((height, width), data)
    width, height, _, _, compression = struct.unpack_from("<iiHHI", data, 18)
    is_rle = compression in (_RLE8, _RLE4)
    if is_rle and (len(data) > MAX_RLE_BYTES or width * abs(height) > MAX_RLE_PIXELS):
        raise TooLargeError(
            f"run-length coded BMP of {len(data)} bytes and {width} x {abs(height)} pixels;"
            f" we read those up to {MAX_RLE_BYTES} bytes and {MAX_RLE_PIXELS} pixels"
        )
    return Container((abs(height), width), data)
