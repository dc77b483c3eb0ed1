"""A sheet of a data set's pictures with their annotations, to see at a glance whether these match the objects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from service.errors import DatasetError
from service.imaging.overlay import colour_of
from service.structures import UInt8Array
from service.training.dataset import CocoDataset, Sample

TILE_PIXELS = 320
COLUMNS = 5
_PICTURES = 20
_CAPTION_PIXELS = 18


def draw_sheet(datasets: Sequence[CocoDataset]) -> Image.Image:
    """Draw up to 20 pictures of each data set, evenly spread, those with objects first."""
    tiles = [
        _tile(sample, dataset.labels, f"{dataset.path.stem}: {sample.path.name}")
        for dataset in datasets
        for sample in _chosen(dataset, _PICTURES)
    ]
    rows = math.ceil(len(tiles) / COLUMNS)
    side = TILE_PIXELS + 4
    sheet = Image.new("RGB", (min(len(tiles), COLUMNS) * side, rows * (side + _CAPTION_PIXELS)), "white")
    for place, tile in enumerate(tiles):
        row, column = divmod(place, COLUMNS)
        sheet.paste(tile, (column * side, row * (side + _CAPTION_PIXELS)))
    return sheet


def write_sheet(sheet: Image.Image, path: Path) -> None:
    """Write it as PNG or JPEG, depending on the file suffix.

    Raises:
        DatasetError: the suffix is another, or the file cannot be written.
    """
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise DatasetError(f"expected a sheet named *.png or *.jpg, got {path}")
    try:
        sheet.save(path)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be written: {error.strerror or error}") from error


def _chosen(dataset: CocoDataset, count: int) -> list[Sample]:
    filled = [sample for sample in dataset.samples if len(sample.labels) or sample.crowds]
    candidates = filled or list(dataset.samples)
    places = np.linspace(0, len(candidates) - 1, min(count, len(candidates))).round().astype(int)
    return [candidates[place] for place in places]


def _tile(sample: Sample, labels: Sequence[str], title: str) -> Image.Image:
    pixels = sample.read_pixels().copy()
    height, width = sample.image_size
    scale = TILE_PIXELS / max(height, width)
    line = max(1, round(1.5 / scale))
    for index, mask in enumerate(sample.read_masks()):
        # With a single label each object has its own colour, as in the server's pictures.
        colour = colour_of(index if len(labels) == 1 else int(sample.labels[index]) - 1)
        _draw_outline(pixels, mask.bitmap, (mask.x, mask.y), colour, line)
    picture = Image.fromarray(pixels).resize((max(1, round(width * scale)), max(1, round(height * scale))))
    tile = Image.new("RGB", (TILE_PIXELS, TILE_PIXELS + _CAPTION_PIXELS), "white")
    tile.paste(picture, (0, 0))
    draw = ImageDraw.Draw(tile)
    font = ImageFont.load_default(11)
    for box, label in zip(sample.boxes * scale, sample.labels.tolist(), strict=True):
        colour = colour_of(label - 1)
        if sample.segmentations is None:
            draw.rectangle(tuple(box.tolist()), outline=colour)
        if len(sample.labels) <= 30:
            draw.text(
                (box[0] + 1, box[1]), labels[label - 1], fill=colour, font=font, stroke_width=1, stroke_fill="black"
            )
    for crowd in sample.crowds:
        draw.rectangle([side * scale for side in crowd.box], outline="grey")
    draw.text((2, TILE_PIXELS + 2), title[-52:], fill="black", font=font)
    return tile


def _draw_outline(
    pixels: UInt8Array, bitmap: UInt8Array, offset: tuple[int, int], colour: tuple[int, int, int], line: int
) -> None:
    contours, _ = cv2.findContours(bitmap, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=offset)
    cv2.drawContours(pixels, contours, -1, colour, line)
