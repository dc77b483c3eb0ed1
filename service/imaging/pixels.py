"""Any of Pillow's modes to 8-bit RGB, so that what the model sees is what a viewer shows. Called by `decode.py`.

Pillow's own `convert("RGB")` is right for most modes. Not for these: 16-bit grey (it clips at 255, so pictures turn
white), 32-bit grey (clipped as well), and transparency (it shows the colours that lie hidden under transparent pixels).
Colour profiles are ignored, as torchvision and OpenCV do. A picture with alpha 255 throughout keeps its exact values.

Shapes: H x W the image.
"""

from __future__ import annotations

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from service.structures import UInt8Array

_BACKGROUND = (255, 255, 255)  # what a browser shows through a transparent picture


def to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Convert a loaded picture of any mode to mode RGB.

    Raises:
        ValueError: a mode that has no conversion to RGB.
    """
    if picture.mode.startswith("I;16"):
        return PIL.Image.fromarray(_from_16_bits(np.asarray(picture))).convert("RGB")
    if picture.mode in ("I", "F"):
        return PIL.Image.fromarray(_stretched(np.asarray(picture))).convert("RGB")
    if picture.has_transparency_data:
        return _on_background(picture.convert("RGBA"))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _from_16_bits(grey: NDArray[np.uint16]) -> UInt8Array:
    """Scale 0...65535 to 0...255, to the nearest. The full range, so equal values look equal in every picture."""
    nearest = (grey.astype(np.uint32) * 255 + 32767) // 65535
    return nearest.astype(np.uint8)


def _stretched(grey: NDArray[np.int32] | NDArray[np.float32]) -> UInt8Array:
    """Scale the smallest value to 0 and the largest to 255: 32-bit grey has no nominal range. Not finite is 0."""
    values = grey.astype(np.float32)
    finite = np.isfinite(values)
    low = values.min(where=finite, initial=np.inf)
    high = values.max(where=finite, initial=-np.inf)
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    values[~finite] = low
    values -= low
    values *= 255 / (high - low)
    return np.rint(values, out=values).astype(np.uint8)


def _on_background(picture: PIL.Image.Image) -> PIL.Image.Image:
    alpha = picture.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return picture.convert("RGB")
    opaque = PIL.Image.new("RGB", picture.size, _BACKGROUND)
    opaque.paste(picture, mask=alpha)
    return opaque
