"""The result of every container reader."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Container:
    """An image file whose header has been read.

    Attributes:
        image_size: (height, width) in pixels as stored, before orientation is applied.
        pixel_data: a valid file of the same format that holds the first picture and nothing else.
        orientation: EXIF orientation, 1 to 8; 1 is upright.
        num_passes: how many times a decoder visits all pixels: the scans of a progressive JPEG, else 1.
        is_baseline_jpeg: whether it is a complete JPEG of the kind that every decoder reads alike; see `read_jpeg`.
    """

    image_size: tuple[int, int]
    pixel_data: bytes
    orientation: int = 1
    num_passes: int = 1
    is_baseline_jpeg: bool = False
