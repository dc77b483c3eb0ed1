"""Bytes of an image file to upright RGB pixels: the whole path. Called by `pipeline.py` in a thread; holds no state.
Images come from strangers: limits are checked on the header before anything is decoded, and whatever a decoder raises
becomes one of three errors, each the fault of this image alone; but for a lack of memory, which is ours.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import simplejpeg
from PIL import ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service.errors import InvalidImageError, InvalidRequestError, OutOfMemoryError, TooLargeError
from service.imaging.containers import Container, read_container
from service.imaging.formats import ImageFormat, sniff_format
from service.imaging.pixels import to_rgb
from service.structures import Image, UInt8Array

_DECODERS: dict[ImageFormat, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}
# What these kinds of JPEG mean in RGB leaves no choice. Ink (CMYK) and whatever is rarer is Pillow's.
_PLAIN_COLOURS = ("YCbCr", "Gray", "RGB")
# By EXIF orientation: swap rows and columns, then mirror (OpenCV's flip code: 0 upside down, 1 left to right, -1 both).
_UPRIGHT = {
    2: (False, 1),
    3: (False, -1),
    4: (False, 0),
    5: (True, None),
    6: (True, 1),
    7: (True, -1),
    8: (True, 0),
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

    def check(self, image_size: tuple[int, int]) -> None:
        """Refuse an image of this (height, width).

        Raises:
            InvalidImageError: it has no pixels.
            TooLargeError: it is over one of the limits.
        """
        height, width = image_size
        if height <= 0 or width <= 0:
            raise InvalidImageError(f"the image is {width} x {height} pixels")
        long, short = max(image_size), min(image_size)
        if height * width > self.max_image_pixels:
            raise TooLargeError(f"{width} x {height} pixels; at most {self.max_image_pixels} in all are accepted")
        if long > self.max_side_pixels:
            raise TooLargeError(f"{width} x {height} pixels; at most {self.max_side_pixels} a side are accepted")
        if long > short * self.max_aspect_ratio:
            raise TooLargeError(f"{width} x {height} pixels; a side may be {self.max_aspect_ratio:g} times the other")


def decode_image(
    data: bytes, *, limits: ImageLimits, before_decoding: Callable[[int], None] = lambda pixels: None
) -> Image:
    """Decode the first picture of an image file and turn it upright.

    Transparent pixels are laid over white, 16-bit grey is scaled to 8 bits, colour profiles are ignored.

    Args:
        data: a whole JPEG, PNG, WebP, GIF, BMP or TIFF file.
        limits: what to refuse before decoding.
        before_decoding: called with the number of pixels when the header is known to be good. May wait, and may raise.

    Raises:
        UnsupportedImageError: not one of these formats, or a rare kind of one.
        TooLargeError: over one of the limits.
        InvalidImageError: no bytes, or bytes that do not decode.
        OutOfMemoryError: there is no memory for the pixels.
    """
    image_format = sniff_format(data)
    with _as_invalid_image(image_format):
        container = read_container(data, image_format)
        limits.check(container.image_size)
    height, width = container.image_size
    before_decoding(height * width)
    with _as_invalid_image(image_format):
        pixels = _decode(container, image_format)
        return Image(_turned_upright(pixels, container.orientation), orientation_applied=container.orientation != 1)


def _decode(container: Container, image_format: ImageFormat) -> UInt8Array:
    if image_format == "JPEG":
        # It takes a half to a third of Pillow's time for the same pixels, but would accept less: it calls anything out
        # of order an error, which Pillow does only where pixels are missing. So what it refuses, Pillow judges.
        with suppress(ValueError):
            return _decode_plain_jpeg(container)
    return _decode_with_pillow(container, image_format)


def _decode_plain_jpeg(container: Container) -> UInt8Array:
    """Decode with libjpeg-turbo and without a copy.

    Raises:
        ValueError: a kind that has no plain colours, or data that are not in order.
    """
    height, width, colours, _ = simplejpeg.decode_jpeg_header(container.pixel_data)
    if (height, width) != container.image_size or colours not in _PLAIN_COLOURS:
        raise ValueError
    pixels: UInt8Array = simplejpeg.decode_jpeg(container.pixel_data)
    return pixels


def _decode_with_pillow(container: Container, image_format: ImageFormat) -> UInt8Array:
    # Always from memory: from a real file Pillow believes a chunk's length and allocates it. And not through
    # `PIL.Image.open`, which tries formats in turn and warns about sizes that our limits allow.
    picture = _DECODERS[image_format](io.BytesIO(container.pixel_data))
    if (picture.height, picture.width) != container.image_size:
        raise InvalidImageError(f"two parts of the {image_format} data disagree about the size")
    picture.load()
    return np.array(to_rgb(picture))


def _turned_upright(pixels: UInt8Array, orientation: int) -> UInt8Array:
    if orientation == 1:
        return pixels
    swaps_sides, flip_code = _UPRIGHT[orientation]
    turned = cv2.transpose(pixels) if swaps_sides else pixels
    return cast(UInt8Array, turned if flip_code is None else cv2.flip(turned, flip_code))


@contextmanager
def _as_invalid_image(image_format: ImageFormat) -> Iterator[None]:
    """Broken files make decoders raise nearly anything: OSError, SyntaxError, IndexError, OverflowError, ..."""
    try:
        yield
    except InvalidRequestError:
        raise
    except MemoryError as error:
        # What the header asks for is within the limits, so the memory is short, not the file at fault.
        raise OutOfMemoryError("not enough memory to decode the image") from error
    except Exception as error:
        # Decoders speak of streams, tiles and buffers, which means nothing to whoever sent the file.
        ends_early = isinstance(error, struct.error | IndexError) or "truncated" in str(error).lower()
        problem = "are truncated" if ends_early else "are damaged, or of a kind that we do not read"
        raise InvalidImageError(f"the {image_format} data {problem}") from error
