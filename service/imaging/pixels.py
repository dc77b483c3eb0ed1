"""Convert any of Pillow's modes to 8-bit RGB, so that the model sees what a viewer shows.

Pillow's own `convert("RGB")` is right for most modes, but not for 16-bit grey (it clips at 255, so pictures turn
white), 32-bit grey (clipped as well), and transparency (it reveals the colours hidden under transparent pixels). Colour
profiles are ignored, as in torchvision and OpenCV. A picture with alpha 255 throughout keeps its exact values.

Shapes: H x W the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from service.structures import Intensity, UInt8Array

# Pillow converts a band of this size in less than a millisecond, during which no other thread can run Python.
_BAND_PIXELS = 1 << 17
# 32-bit grey: the picture itself determines black and white.
_WITHOUT_RANGE = ("I", "F")
_SIXTEEN_BITS = "I;16"  # and its byte orders
_BACKGROUND = (255, 255, 255)  # what a browser shows through a transparent picture


def rgb_pixels(
    picture: PIL.Image.Image, *, intensity: Intensity = "full", before_band: Callable[[], None] = lambda: None
) -> UInt8Array:
    """Convert a loaded picture of any mode to pixels, in bands, so that the whole is not copied twice.

    Args:
        intensity: which value is white in 16-bit grey: the end of the full range, or the picture's own maximum.
        before_band: called before each band of some hundred thousand pixels; may raise.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: the mode has no conversion to RGB.
    """
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)
    bands = list(_bands(picture))
    is_stretched = intensity == "stretch" and picture.mode.startswith(_SIXTEEN_BITS)
    value_range = _value_range(picture, bands) if is_stretched or picture.mode in _WITHOUT_RANGE else None
    for top, bottom in bands:
        before_band()
        band = picture.crop((0, top, picture.width, bottom)) if len(bands) > 1 else picture
        pixels[top:bottom] = np.asarray(_to_rgb(band, value_range))
    return pixels


def _bands(picture: PIL.Image.Image) -> Iterator[tuple[int, int]]:
    rows = max(1, _BAND_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        yield top, min(top + rows, picture.height)


def _to_rgb(picture: PIL.Image.Image, value_range: tuple[float, float] | None) -> PIL.Image.Image:
    if value_range is not None:
        return PIL.Image.fromarray(_stretched(np.asarray(picture), *value_range)).convert("RGB")
    if picture.mode.startswith(_SIXTEEN_BITS):
        return PIL.Image.fromarray(_from_16_bits(np.asarray(picture))).convert("RGB")
    if picture.has_transparency_data:
        return _on_background(picture.convert("RGBA"))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _from_16_bits(grey: NDArray[np.uint16]) -> UInt8Array:
    """Scale 0...65535 to 0...255, rounded to nearest. Always the full range, so that equal values look equal in every
    picture.
    """
    nearest = (grey.astype(np.uint32) * 255 + 32767) // 65535
    return nearest.astype(np.uint8)


def _value_range(picture: PIL.Image.Image, bands: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """The smallest and the largest finite value; (inf, -inf) if there is none."""
    low, high = np.inf, -np.inf
    for top, bottom in bands:
        values = np.asarray(picture.crop((0, top, picture.width, bottom))).astype(np.float32)
        finite = np.isfinite(values)
        low = min(low, float(values.min(where=finite, initial=np.inf)))
        high = max(high, float(values.max(where=finite, initial=-np.inf)))
    return low, high


def _stretched(
    grey: NDArray[np.uint16] | NDArray[np.int32] | NDArray[np.float32], low: float, high: float
) -> UInt8Array:
    """Scale `low` to 0 and `high` to 255: 32-bit grey has no nominal range. Non-finite values become 0."""
    values = grey.astype(np.float32)
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    values[~np.isfinite(values)] = low
    values -= np.float32(low)
    values *= np.float32(255 / (high - low))
    return np.rint(values, out=values).astype(np.uint8)


def _on_background(picture: PIL.Image.Image) -> PIL.Image.Image:
    alpha = picture.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return picture.convert("RGB")
    opaque = PIL.Image.new("RGB", picture.size, _BACKGROUND)
    opaque.paste(picture, mask=alpha)
    return opaque
