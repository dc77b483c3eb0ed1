"""Compare a device's JPEG decoder with the CPU's on one fixed picture."""

from __future__ import annotations

import logging

import numpy as np
import simplejpeg

from service.errors import first_line
from service.imaging.decode import ImageLimits, JpegDecoder, decode_image
from service.structures import UInt8Array

logger = logging.getLogger(__name__)

# The standard leaves the rounding of the cosine transform and the enlargement of the half-size colours to the decoder.
# Rounding changes a few levels. Enlarging by repetition instead of interpolation changes up to half the step between
# neighbouring colour samples, which is little in this picture, whose colours change slowly. libjpeg-turbo's own fast
# modes differ by 5 levels, 1.02 on average. Swapped channels or planes, another conversion from YCbCr, and a picture
# that is shifted or not finished differ by 19 or more. The mean is what torchvision's tests allow nvJPEG.
MAX_DIFFERENCE = 16
MAX_MEAN_DIFFERENCE = 2.0

_LIMITS = ImageLimits(max_image_pixels=1_000_000)


def checked_decoder(decoder: JpegDecoder) -> JpegDecoder | None:
    """The decoder if it gives the CPU's pixels, up to `MAX_DIFFERENCE` levels of 255 and `MAX_MEAN_DIFFERENCE` on
    average; None, with a line in the log, if it does not.
    """
    data = fixed_jpeg()
    expected = decode_image(data, limits=_LIMITS).pixels
    try:
        problem = _difference(decoder(data), expected)
    except RuntimeError as error:
        problem = first_line(error)
    if problem is None:
        return decoder
    logger.warning("the device's JPEG decoder fails its check; the CPU decodes", extra={"fields": {"reason": problem}})
    return None


def fixed_jpeg() -> bytes:
    """Colours that change slowly, no two channels or directions alike, under fine stripes of brightness. Neither side
    is a multiple of the 16 pixels that are coded together.
    """
    y, x = np.mgrid[:270, :470].astype(np.float32)
    stripes = 20 * np.sin(x / 3 + y / 5)
    pixels = np.dstack([40 + x * 0.35, 210 - y * 0.6, 60 + (x + y) * 0.15]) + stripes[..., None]
    data: bytes = simplejpeg.encode_jpeg(pixels.round().astype(np.uint8), quality=92, colorsubsampling="420")
    return data


def _difference(pixels: UInt8Array, expected: UInt8Array) -> str | None:
    """What is wrong with the pixels; None if they are close enough."""
    if pixels.shape != expected.shape:
        return f"expected pixels of {expected.shape}, got {pixels.shape}"
    difference = np.abs(pixels.astype(np.int16) - expected)
    most, mean = int(difference.max()), float(difference.mean())
    if most <= MAX_DIFFERENCE and mean <= MAX_MEAN_DIFFERENCE:
        return None
    return (
        f"its pixels differ from the CPU's by up to {most} levels, {mean:.2f} on average; tolerated are "
        f"{MAX_DIFFERENCE} and {MAX_MEAN_DIFFERENCE:g}"
    )
