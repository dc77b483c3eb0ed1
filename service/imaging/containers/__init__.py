"""One file a format: read its container, not its pixels. `read_container` tells the picture's size and orientation from
the header, and makes a copy in which only what the pixels need is left, so that a decoder meets no text, profile,
thumbnail or later frame, which is where files hide their bombs. Knows no limits of the settings.

Every step of these readers consumes bytes and all counts are bounded, so their time is linear in the body's size.
"""

from __future__ import annotations

from service.imaging.containers.bmp import read_bmp
from service.imaging.containers.container import Container
from service.imaging.containers.gif import read_gif
from service.imaging.containers.jpeg import read_jpeg
from service.imaging.containers.png import read_png
from service.imaging.containers.tiff import read_tiff
from service.imaging.containers.webp import read_webp
from service.imaging.formats import ImageFormat

__all__ = ["Container", "read_container"]

_READERS = {
    "JPEG": read_jpeg,
    "PNG": read_png,
    "WebP": read_webp,
    "GIF": read_gif,
    "BMP": read_bmp,
    "TIFF": read_tiff,
}


def read_container(data: bytes, image_format: ImageFormat) -> Container:
    """Read the header of an image of this format; decodes nothing.

    Raises:
        InvalidImageError: the bytes are not laid out as the format says, or are built to waste time.
        UnsupportedImageError: a kind of this format that we do not read.
    """
    return _READERS[image_format](data)
