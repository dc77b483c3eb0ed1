"""EXIF orientation, the only metadata that changes where a pixel is. EXIF is a TIFF directory; only its first is read.

Read here and not with Pillow, whose reader copies the value of every tag, and 65,535 tags may each point at the same
megabytes. Orientation that stands in XMP only is ignored, as browsers and OpenCV do.
"""

from __future__ import annotations

import struct

from service.errors import InvalidImageError
from service.imaging.containers.directory import read_directory

ORIENTATION_TAG = 0x0112


def read_orientation(exif: bytes) -> int:
    """The orientation in an EXIF block (from its byte-order mark on), 1 to 8.

    Broken EXIF, a string or a number that means nothing is no reason to refuse a picture: all are 1, upright.
    """
    try:
        orientation = read_directory(exif).integer(ORIENTATION_TAG)
    except (InvalidImageError, struct.error):
        return 1
    return orientation if orientation is not None and 1 <= orientation <= 8 else 1
