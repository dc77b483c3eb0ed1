"""EXIF orientation, the only metadata that changes where a pixel is. EXIF is a TIFF file; only its first directory is
read. Pillow's reader is not used because it copies the value of every tag, and 65,535 tags may each point at the same
megabytes. An orientation given only in XMP is ignored, as in browsers and OpenCV.
"""

from __future__ import annotations

import struct

from service.errors import InvalidImageError
from service.imaging.containers.directory import read_directory

ORIENTATION_TAG = 0x0112


def read_orientation(exif: bytes) -> int:
    """The orientation in an EXIF block (from its byte-order mark on), 1 to 8.

    Broken EXIF, a string or a meaningless number is no reason to reject a picture: all count as 1, upright.
    """
    try:
        orientation = read_directory(exif).integer(ORIENTATION_TAG)
    except (InvalidImageError, struct.error):
        return 1
    return orientation if orientation is not None and 1 <= orientation <= 8 else 1
