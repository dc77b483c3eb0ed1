"""Buckets: a few sizes to which batches are padded, so that pictures of many sizes can share a batch and its size does
not depend on which of them do. Knows sizes only, (height, width) in pixels of resized images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]

_ASPECT_RATIOS = (1.0, 4 / 3, 3 / 2, 2.0, 3.0)
"""Of the longer side to the shorter: what cameras take, and two longer ones."""
_WORTHWHILE = 0.93
"""A bucket is left out if its area is more than this share of another one's that contains it."""


def round_up(size: Size, multiple: int) -> Size:
    """Each side rounded up to a multiple of `multiple`."""
    height, width = (math.ceil(side / multiple) * multiple for side in size)
    return height, width


def derive_buckets(min_size: int, max_size: int, multiple: int = 32) -> tuple[Size, ...]:
    """The buckets of a network, by area: at most eleven, of which one holds each image that it resizes.

    Args:
        min_size: length of the resized image's shorter side, unless the longer one would exceed `max_size`.
        max_size: limit of its longer side.
        multiple: each bucket's sides are multiples of this.
    """
    # At this ratio an image has both lengths, so its bucket holds every other one.
    ratios = {*_ASPECT_RATIOS, max_size / min_size}
    shapes = {round_up(_resized(ratio, min_size, max_size), multiple) for ratio in ratios}
    landscape = [
        shape
        for shape in shapes
        if not any(
            other != shape and _holds(other, shape) and _area(shape) > _WORTHWHILE * _area(other) for other in shapes
        )
    ]
    return tuple(sorted({*landscape, *((width, height) for height, width in landscape)}, key=_by_area))


def smallest_bucket(size: Size, buckets: Sequence[Size]) -> Size | None:
    """The smallest bucket that holds an image of this size; None if none does."""
    return min((bucket for bucket in buckets if _holds(bucket, size)), key=_by_area, default=None)


def _resized(ratio: float, min_size: int, max_size: int) -> Size:
    """The size to which the network resizes an image `ratio` times as wide as high."""
    height = min(float(min_size), max_size / ratio)
    return math.ceil(height), math.ceil(height * ratio)


def _holds(bucket: Size, size: Size) -> bool:
    return bucket[0] >= size[0] and bucket[1] >= size[1]


def _area(size: Size) -> int:
    return size[0] * size[1]


def _by_area(size: Size) -> tuple[int, Size]:
    return _area(size), size
