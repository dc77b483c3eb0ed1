"""Container readers, one file per format: they read the header, not the pixels. `read_container` gets the picture's
size and orientation, and makes a copy that keeps only what the pixels need: no text, profiles, thumbnails or later
frames, which is where decompression bombs hide. The configured limits are not checked here.

Every step of a reader consumes bytes and all counts are bounded, so its time is linear in the size of the body.
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
        InvalidImageError: the bytes violate the format, or are built to waste time.
        UnsupportedImageError: a variant of the format that we do not read.
    """
    return _READERS[image_format](data)
