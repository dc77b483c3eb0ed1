"""Masks in the forms in which the server sends them, and into arrays: COCO's compressed run lengths, polygons, PNG of
the whole image and PNG of the object's rectangle.

Shapes: H x W the image's height and width.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from roiserve_client.png import decode_grey_png

BoolArray = npt.NDArray[np.bool_]
MaskForm = Literal["rle", "polygons", "png", "crop"]


@dataclass(frozen=True, slots=True)
class Mask:
    """The pixels of one object.

    Attributes:
        data: as in the answer's JSON: `{"size": [H, W], "counts": "…"}`, a list of polygons, a PNG in base64, or
            `{"origin": [x, y], "size": [h, w], "png": "…"}`.
        image_size: (H, W).
    """

    data: Any
    image_size: tuple[int, int]

    @property
    def form(self) -> MaskForm:
        """Which of the four forms the data has."""
        if isinstance(self.data, str):
            return "png"
        if isinstance(self.data, Mapping):
            return "rle" if "counts" in self.data else "crop"
        return "polygons"

    def to_numpy(self) -> BoolArray:
        """(H, W) bool: the mask in pixels of the whole image.

        Raises:
            ValueError: the data is damaged.
        """
        if self.form == "rle":
            return decode_rle(self.data)
        if self.form == "polygons":
            return fill_polygons(self.data, self.image_size)
        if self.form == "png":
            return decode_grey_png(base64.b64decode(self.data)) > 0
        return self._from_crop()

    def _from_crop(self) -> BoolArray:
        (x, y), (height, width) = self.data["origin"], self.data["size"]
        mask = np.zeros(self.image_size, np.bool_)
        mask[y : y + height, x : x + width] = decode_grey_png(base64.b64decode(self.data["png"])) > 0
        return mask


def decode_rle(rle: Mapping[str, Any]) -> BoolArray:
    """Decode COCO's run lengths: those of zeros and of ones in turn, column by column.

    Args:
        rle: `size` as [H, W], and `counts` as compressed text, or as a list of numbers.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: the runs do not cover the image exactly.
    """
    height, width = rle["size"]
    counts = rle["counts"]
    runs = _decompress(counts) if isinstance(counts, str | bytes) else np.asarray(counts, np.int64)
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"expected run lengths of {height} x {width} pixels, got {runs.sum()} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def _decompress(counts: str | bytes) -> npt.NDArray[np.int64]:
    """Run lengths from COCO's characters: five bits a character, the lowest first and with a sign, of differences to
    the run before the last (`rleFrString` in pycocotools).
    """
    characters = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, np.uint8)
    digits = characters.astype(np.int64) - 48
    if len(digits) == 0 or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("expected COCO's compressed run lengths, got other characters")
    is_last = digits & 32 == 0
    number = np.concatenate([[0], np.cumsum(is_last)[:-1]])  # the number that each character belongs to
    starts = np.concatenate([[0], np.flatnonzero(is_last)[:-1] + 1])
    place = np.arange(len(digits)) - starts[number]
    if place.max() > 11:
        raise ValueError("expected COCO's compressed run lengths, got a number of more than 60 bits")
    runs = np.zeros(len(starts), np.int64)
    np.add.at(runs, number, (digits & 31) << (5 * place))
    ends = np.flatnonzero(is_last)
    runs -= np.where(digits[ends] & 16, 1 << (5 * (place[ends] + 1)), 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def fill_polygons(polygons: Sequence[Sequence[float]], image_size: tuple[int, int]) -> BoolArray:
    """Fill polygons: a pixel is in the mask if its centre lies inside one of them, by the even-odd rule.

    The server's polygons run along the edges of pixels, and those are filled exactly.

    Args:
        polygons: each [x1, y1, x2, y2, …] in pixels.
        image_size: (H, W).

    Returns:
        (H, W) bool.
    """
    mask = np.zeros(image_size, np.bool_)
    for polygon in polygons:
        mask |= _fill(np.asarray(polygon, np.float64).reshape(-1, 2), image_size)
    return mask


def _fill(corners: npt.NDArray[np.float64], image_size: tuple[int, int]) -> BoolArray:
    """Each side flips the pixels to the right of it, so that an odd number of flips means inside."""
    height, width = image_size
    flips = np.zeros((height, width + 1), np.bool_)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y1 == y2:
            continue
        top, bottom = np.clip(np.ceil(np.sort([y1, y2]) - 0.5), 0, height).astype(int)
        rows = np.arange(top, bottom)
        crossings = x1 + (rows + 0.5 - y1) * (x2 - x1) / (y2 - y1)
        flips[rows, np.clip(np.ceil(crossings - 0.5), 0, width).astype(int)] ^= True
    return np.logical_xor.accumulate(flips[:, :width], axis=1)
