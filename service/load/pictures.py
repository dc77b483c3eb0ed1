"""The pictures to send: files of a folder as they are on disk, in an order determined by a seed. Nothing is decoded:
the server decides whether the bytes are a picture.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from service.errors import InvalidRequestError

T = TypeVar("T")

CONTENT_TYPES = {
    ".bmp": "image/bmp",
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".webp": "image/webp",
}
"""The file suffixes that are read, in lower case, and their HTTP content types."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded picture."""

    name: str
    content_type: str
    data: bytes


def read_pictures(folder: Path) -> list[Picture]:
    """All pictures below a folder, by name.

    Raises:
        InvalidRequestError: there is no such folder, or it has no pictures.
    """
    if not folder.is_dir():
        raise InvalidRequestError(f"expected a folder of pictures, got {folder}")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in CONTENT_TYPES and file.is_file())
    if not files:
        raise InvalidRequestError(f"no pictures in {folder}; looked for {', '.join(CONTENT_TYPES)}")
    return [
        Picture(str(file.relative_to(folder)), CONTENT_TYPES[file.suffix.lower()], file.read_bytes()) for file in files
    ]


def endless(items: Sequence[T], *, seed: int) -> Iterator[T]:
    """All items in random order, then all in another random order, forever. The same seed gives the same order."""
    order = random.Random(seed)
    while True:
        yield from order.sample(items, len(items))
