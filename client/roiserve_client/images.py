"""What can be given as an image, and the bytes that are sent of it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from roiserve_client.errors import ImageError
from roiserve_client.png import encode_png

# What PNG can hold; other modes are converted, as PIL's own `convert` does it.
_PNG_MODES = {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"}


@runtime_checkable
class PilImage(Protocol):
    """What is used of a `PIL.Image.Image`, so that Pillow need not be installed."""

    @property
    def mode(self) -> str:
        """PIL's word for the type of the pixels, such as `RGB`."""

    def convert(self, mode: str) -> PilImage:
        """The picture in another mode."""

    def save(self, fp: IO[bytes], format: str, *, compress_level: int) -> None:
        """Write the picture."""


ImageLike: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | npt.NDArray[Any] | PilImage
"""The path of a file, the bytes of a file, an open binary file, pixels as (H, W) or (H, W, C) in RGB order, uint8 or
uint16, or a picture of Pillow."""


def read_image(image: ImageLike) -> bytes:
    """The bytes that are sent: files as they are, pixels as PNG.

    Raises:
        OSError: the file cannot be read.
        ImageError: not an image.
    """
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, np.ndarray):
        try:
            return encode_png(image)
        except ValueError as error:
            raise ImageError(str(error)) from None
    if isinstance(image, PilImage):
        return _save(image)
    if callable(getattr(image, "read", None)):
        return _read(image)
    raise ImageError(f"expected a path, bytes, a binary file, a NumPy array or a PIL image, got {type(image).__name__}")


def name_of(image: ImageLike) -> str:
    """A file name for the form, in valid Unicode, which names of files need not be."""
    if not isinstance(image, str | os.PathLike):
        return "image"
    return os.fsencode(Path(image).name).decode("utf-8", "replace")


def _save(image: PilImage) -> bytes:
    if image.mode == "F":
        raise ImageError("expected a picture of whole numbers, got one of mode F; convert it first")
    file = io.BytesIO()
    picture = image if image.mode in _PNG_MODES else image.convert("I;16" if image.mode == "I" else "RGB")
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _read(file: IO[bytes]) -> bytes:
    data: object = file.read()
    if not isinstance(data, bytes):
        raise ImageError("expected a file opened in binary mode, as by open(path, 'rb')")
    return data
