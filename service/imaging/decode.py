"""Decode an image file to upright RGB pixels: the whole path. Stateless.

Images are untrusted: limits are checked on the header before anything is decoded, and whatever a decoder raises becomes
one of three errors about this image. The exception is running out of memory, which is the server's problem.
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import simplejpeg
from PIL import ImageFile, _imaging
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service.errors import (
    CancelledRequestError,
    InvalidImageError,
    InvalidRequestError,
    OutOfMemoryError,
    TooLargeError,
    first_line,
)
from service.imaging.containers import Container, read_container
from service.imaging.formats import ImageFormat, sniff_format
from service.imaging.pixels import rgb_pixels
from service.imaging.quiet import complaints_counted
from service.structures import Image, Intensity, UInt8Array

logger = logging.getLogger(__name__)

JpegDecoder = Callable[[bytes], UInt8Array]
"""Decodes a JPEG to (H, W, 3) uint8 RGB as stored; raises RuntimeError if it cannot."""

_DECODERS: dict[ImageFormat, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}
# These kinds of JPEG have only one possible meaning in RGB. CMYK and anything rarer is left to Pillow.
_PLAIN_COLOURS = ("YCbCr", "Gray", "RGB")
# Images with more pixels times scans go straight to Pillow, so that they are not decoded twice if they are malformed.
_MAX_TRIED_PIXELS = 200_000_000
# How Pillow holds the pixels of those modes that large pictures have.
_PIXEL_BYTES = {"L": 1, "LA": 4, "RGB": 4, "RGBA": 4, "CMYK": 4}
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
    """Limits that are checked on the header alone.

    Attributes:
        max_image_pixels: width times height.
        max_side_pixels: the longer side.
        max_aspect_ratio: the longer side divided by the shorter; beyond it a resized picture would be less than a pixel
            wide.
    """

    max_image_pixels: int
    max_side_pixels: int = 32_768
    max_aspect_ratio: float = 200.0

    def check(self, image_size: tuple[int, int]) -> None:
        """Check an image of this (height, width).

        Raises:
            InvalidImageError: it has no pixels.
            TooLargeError: it exceeds one of the limits.
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
    data: bytes,
    *,
    limits: ImageLimits,
    intensity: Intensity = "full",
    before_decoding: Callable[[int], None] = lambda pixels: None,
    should_stop: Callable[[], bool] = lambda: False,
    jpeg_decoder: JpegDecoder | None = None,
) -> Image:
    """Decode the first picture of an image file and turn it upright.

    Transparent pixels are composited over white, 16-bit grey is scaled to 8 bits, and colour profiles are ignored.

    Args:
        data: a whole JPEG, PNG, WebP, GIF, BMP or TIFF file.
        limits: checked before decoding.
        intensity: see `Encoded`.
        before_decoding: called with the number of pixels once the header has passed the checks. May block, and may
            raise.
        should_stop: called between steps of the work, each well below a second; returns whether the caller has given
            up.
        jpeg_decoder: decodes baseline JPEGs; files that it rejects are decoded as without it.

    Raises:
        UnsupportedImageError: not one of these formats, or a rare kind of one.
        TooLargeError: exceeds one of the limits.
        InvalidImageError: no bytes, or bytes that do not decode.
        OutOfMemoryError: there is no memory for the pixels.
        CancelledRequestError: `should_stop` returned True.
    """
    image_format = sniff_format(data)
    with _as_invalid_image(image_format):
        container = read_container(data, image_format)
        limits.check(container.image_size)
    height, width = container.image_size
    before_decoding(height * width)
    with _as_invalid_image(image_format):
        pixels = _decode(container, image_format, intensity, _Watch(should_stop), jpeg_decoder)
        return Image(_turned_upright(pixels, container.orientation), orientation_applied=container.orientation != 1)


class _Watch:
    """Called between steps of the work; raises if the caller has given up."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self) -> None:
        if self._should_stop():
            raise CancelledRequestError("nobody waits for this image any more")


class _WatchedFile(io.BytesIO):
    """A file in memory. Pillow feeds most decoders 64 KiB at a time; the watch is called before each read."""

    def __init__(self, data: bytes, watch: _Watch) -> None:
        super().__init__(data)
        self._watch = watch

    def read(self, size: int | None = -1, /) -> bytes:
        self._watch()
        return super().read(size)


def _decode(
    container: Container,
    image_format: ImageFormat,
    intensity: Intensity,
    watch: _Watch,
    jpeg_decoder: JpegDecoder | None,
) -> UInt8Array:
    watch()
    if jpeg_decoder is not None and container.is_baseline_jpeg:
        with suppress(ValueError):
            return _decode_baseline_jpeg(container, jpeg_decoder)
        watch()
    height, width = container.image_size
    if image_format == "JPEG" and container.num_passes * height * width <= _MAX_TRIED_PIXELS:
        # simplejpeg takes a half to a third of Pillow's time for the same pixels, but it is stricter: any irregularity
        # is an error, whereas Pillow fails only if pixels are missing. So Pillow gets the files that simplejpeg
        # rejects.
        with suppress(ValueError):
            return _decode_plain_jpeg(container)
        watch()
    return _decode_with_pillow(container, image_format, intensity, watch)


def _decode_baseline_jpeg(container: Container, jpeg_decoder: JpegDecoder) -> UInt8Array:
    """Decode with the decoder that was passed.

    Raises:
        ValueError: it fails, or its pixels have another size than the header says.
    """
    try:
        pixels = jpeg_decoder(container.pixel_data)
        if pixels.shape != (*container.image_size, 3):
            raise ValueError(f"expected {container.image_size} pixels, got an array of {pixels.shape}")
    except (RuntimeError, ValueError) as error:
        fields = {"reason": first_line(error)}
        logger.info("the device does not decode a JPEG; the CPU tries", extra={"fields": fields})
        raise ValueError from error
    return pixels


def _decode_plain_jpeg(container: Container) -> UInt8Array:
    """Decode with libjpeg-turbo, without a copy.

    Raises:
        ValueError: not one of the plain colour spaces, or malformed data.
    """
    height, width, colours, _ = simplejpeg.decode_jpeg_header(container.pixel_data)
    if (height, width) != container.image_size or colours not in _PLAIN_COLOURS:
        raise ValueError
    pixels: UInt8Array = simplejpeg.decode_jpeg(container.pixel_data)
    return pixels


def _decode_with_pillow(
    container: Container, image_format: ImageFormat, intensity: Intensity, watch: _Watch
) -> UInt8Array:
    # Always from memory: with a real file Pillow trusts a chunk's length and allocates it. And not through
    # `PIL.Image.open`, which tries formats in turn and warns about sizes that our limits allow.
    with complaints_counted() as complaints:
        picture = _DECODERS[image_format](_WatchedFile(container.pixel_data, watch))
        if (picture.height, picture.width) != container.image_size:
            raise InvalidImageError(f"two parts of the {image_format} data disagree about the size")
        _give_memory(picture)
        picture.load()
    if complaints.count:
        logger.debug("libtiff complains", extra={"fields": {"lines": complaints.count}})
    return rgb_pixels(picture, intensity=intensity, before_band=watch)


def _give_memory(picture: ImageFile.ImageFile) -> None:
    """Let Pillow decode into memory that the system zeroes page by page when it is written to. Pillow's own is zeroed
    at once, and given back piece by piece, while no other thread can run Python: for 50 megapixels, tens of
    milliseconds.
    """
    pixel_bytes = _PIXEL_BYTES.get(picture.mode)
    if pixel_bytes is not None:
        width, height = picture.size
        memory = np.zeros(height * width * pixel_bytes, np.uint8)
        picture.im = _imaging.map_buffer(memory, picture.size, "raw", 0, (picture.mode, width * pixel_bytes, 1))


def _turned_upright(pixels: UInt8Array, orientation: int) -> UInt8Array:
    if orientation == 1:
        return pixels
    swaps_sides, flip_code = _UPRIGHT[orientation]
    turned = cv2.transpose(pixels) if swaps_sides else pixels
    return cast(UInt8Array, turned if flip_code is None else cv2.flip(turned, flip_code))


@contextmanager
def _as_invalid_image(image_format: ImageFormat) -> Iterator[None]:
    """Translate errors: broken files make decoders raise nearly anything (OSError, SyntaxError, IndexError,
    OverflowError, …).
    """
    try:
        yield
    except (InvalidRequestError, CancelledRequestError):
        raise
    except MemoryError as error:
        # The size in the header is within the limits, so the machine is short of memory; the file is not at fault.
        raise OutOfMemoryError("not enough memory to decode the image") from error
    except Exception as error:
        # Decoders talk about streams, tiles and buffers, which means nothing to the client.
        ends_early = isinstance(error, struct.error | IndexError) or "truncated" in str(error).lower()
        problem = "are truncated" if ends_early else "are damaged, or of a kind that we do not read"
        raise InvalidImageError(f"the {image_format} data {problem}") from error
