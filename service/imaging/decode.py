"""Bytes of an image file to upright RGB pixels: the whole path. Called by `pipeline.py` in a thread; holds no state.
Images come from strangers: limits are checked on the header before anything is decoded, and whatever a decoder raises
becomes one of three errors, each the fault of this image alone.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import PIL.Image
from PIL import ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service.errors import InvalidImageError, InvalidRequestError, TooLargeError
from service.imaging.containers import Container, read_container
from service.imaging.formats import ImageFormat, sniff_format
from service.imaging.pixels import to_rgb
from service.structures import Image

_DECODERS: dict[ImageFormat, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}
# What makes the picture upright, by EXIF orientation (Pillow rotates anticlockwise).
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """What is refused from the header alone.

    Attributes:
        max_image_pixels: width times height.
        max_side_pixels: the longer side.
        max_aspect_ratio: the longer side by the shorter; beyond it a resized picture would be less than a pixel wide.
    """

    max_image_pixels: int
    max_side_pixels: int = 32_768
    max_aspect_ratio: float = 200.0


def decode_image(data: bytes, *, limits: ImageLimits) -> Image:
    """Decode the first picture of an image file and turn it upright.

    Transparent pixels are laid over white, 16-bit grey is scaled to 8 bits, colour profiles are ignored.

    Args:
        data: a whole JPEG, PNG, WebP, GIF, BMP or TIFF file.
        limits: what to refuse before decoding.

    Raises:
        UnsupportedImageError: not one of these formats, or a rare kind of one.
        TooLargeError: over one of the limits.
        InvalidImageError: no bytes, or bytes that do not decode.
    """
    image_format = sniff_format(data)
    with _as_invalid_image(image_format):
        container = read_container(data, image_format)
        _check_size(container.image_size, limits)
        picture = to_rgb(_decode(container, image_format))
        upright = picture.transpose(_UPRIGHT[container.orientation]) if container.orientation != 1 else picture
        return Image(np.array(upright), orientation_applied=container.orientation != 1)


def _check_size(image_size: tuple[int, int], limits: ImageLimits) -> None:
    height, width = image_size
    if height <= 0 or width <= 0:
        raise InvalidImageError(f"the image is {width} x {height} pixels")
    long, short = max(image_size), min(image_size)
    if height * width > limits.max_image_pixels:
        raise TooLargeError(f"{width} x {height} pixels; at most {limits.max_image_pixels} in all are accepted")
    if long > limits.max_side_pixels:
        raise TooLargeError(f"{width} x {height} pixels; at most {limits.max_side_pixels} a side are accepted")
    if long > short * limits.max_aspect_ratio:
        raise TooLargeError(f"{width} x {height} pixels; a side may be {limits.max_aspect_ratio:g} times the other")


def _decode(container: Container, image_format: ImageFormat) -> PIL.Image.Image:
    # Always from memory: from a real file Pillow believes a chunk's length and allocates it. And not through
    # `PIL.Image.open`, which tries formats in turn and warns about sizes that our limits allow.
    picture = _DECODERS[image_format](io.BytesIO(container.pixel_data))
    if (picture.height, picture.width) != container.image_size:
        raise InvalidImageError(f"two parts of the {image_format} data disagree about the size")
    picture.load()
    return picture


@contextmanager
def _as_invalid_image(image_format: ImageFormat) -> Iterator[None]:
    """Broken files make decoders raise nearly anything: OSError, SyntaxError, IndexError, MemoryError, ..."""
    try:
        yield
    except InvalidRequestError:
        raise
    except (struct.error, IndexError) as error:
        raise InvalidImageError(f"the {image_format} data end too early") from error
    except Exception as error:
        raise InvalidImageError(
            f"the {image_format} data do not decode: {str(error) or type(error).__name__}"
        ) from error
