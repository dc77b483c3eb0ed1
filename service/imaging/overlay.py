"""Draw detections on the picture: masks, boxes, captions. Knows pixels and detections; knows no models.

Time and memory depend on the objects' boxes, not on the picture, and the number of painted pixels is bounded, however
many large masks there are.

Shapes: D detections of one image, M x M the mask head's output size, H x W the image. Boxes are (x1, y1, x2, y2).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont

from service.errors import CancelledRequestError
from service.structures import ALL_DRAWN_PARTS, Detections, DrawnPart, Float32Array, Image, PastedMask, UInt8Array

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # x1, y1, x2, y2 in whole pixels, the last two exclusive

_MASK_OPACITY = 0.4
_OUTLINE_OPACITY = 0.9
_SHADOW_OPACITY = 0.4
_SHADOW = (np.arange(256) * (1 - _SHADOW_OPACITY)).astype(np.uint8)
# For the boxes of all masks together. Better scores come first; for the rest only the box is drawn.
MAX_MASK_PIXELS = 150_000_000
# Above this share of the picture, captions would hide too much.
_MAX_CAPTION_SHARE = 0.2
# Longer names would be wider than most pictures.
_MAX_NAME_LENGTH = 40
# Of photographs as small as zlib's level 3 with Pillow's filters, in a third of the time; `benchmarks/ops.py` compares.
_PNG_OPTIONS = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_AVG]
_COPIED_BYTES = 1024 * 1024
# All bright enough for black letters on them.
_PALETTE: tuple[Colour, ...] = (
    (60, 200, 80),  # green
    (70, 165, 255),  # blue
    (255, 150, 40),  # orange
    (240, 70, 230),  # magenta
    (255, 225, 25),  # yellow
    (0, 220, 220),  # cyan
    (255, 80, 90),  # red
    (190, 240, 70),  # lime
    (175, 130, 255),  # violet
    (0, 170, 140),  # teal
    (255, 165, 200),  # pink
    (205, 155, 70),  # ochre
    (155, 215, 255),  # sky
    (255, 205, 150),  # apricot
    (150, 255, 190),  # mint
)


@dataclass(frozen=True, slots=True)
class _Caption:
    """A text and its size in pixels."""

    text: str
    width: int
    height: int


def draw_detections(
    image: Image,
    detections: Detections,
    labels: Sequence[str],
    *,
    paste: Callable[[int], PastedMask] | None = None,
    parts: Collection[DrawnPart] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> UInt8Array:
    """Draw masks, boxes and captions (label and score) over a copy of the picture.

    Each label has its own colour, the same in every picture. If a model with masks has only one label, each object has
    its own colour, so that touching objects can be told apart. Better scores are drawn on top. Captions never overlap:
    the best objects' captions are written first, as long as there is room.

    Args:
        labels: class names; `labels[i]` has the id i + 1.
        paste: gives the pixels of detection i's mask; None if there are no masks.
        parts: what to draw. None draws everything, except in a crowd, where captions would hide the picture: then there
            are no captions, and no boxes either if there are masks.
        should_stop: called before each object.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        CancelledRequestError: `should_stop` returned True.
    """
    canvas = image.pixels.copy()
    font_size = max(11, round(min(image.size) / 36))
    line_width = max(1, round(min(image.size) / 300))
    font = ImageFont.load_default(font_size)
    texts = _texts(detections, labels, ALL_DRAWN_PARTS if parts is None else parts)
    captions = [_caption(text, font, font_size) for text in texts]
    if parts is None:
        is_crowd = sum(one.width * one.height for one in captions) > _MAX_CAPTION_SHARE * image.height * image.width
        parts = _parts_by_default(is_crowd=is_crowd, has_masks=paste is not None)
    is_by_object = paste is not None and len(labels) == 1
    colours = [colour_of(i if is_by_object else int(label) - 1) for i, label in enumerate(detections.labels)]
    boxes = _whole_pixels(detections.boxes, image.size)
    draws_masks = paste is not None and "masks" in parts
    with_mask = _number_of_masks(boxes) if draws_masks else 0
    for i in reversed(range(len(detections))):
        if should_stop():
            raise CancelledRequestError("nobody waits for this picture any more")
        mask = paste(i) if paste is not None and i < with_mask else None
        has_pixels = mask is not None and mask.pixels.size > 0
        if mask is not None and has_pixels:
            _draw_mask(canvas, mask, colours[i], line_width)
        if "boxes" in parts or (draws_masks and not has_pixels):
            _draw_box(canvas, boxes[i], colours[i], line_width)
    if {"labels", "scores"} & set(parts):
        _draw_captions(canvas, boxes, captions, colours, font)
    return canvas


def _parts_by_default(*, is_crowd: bool, has_masks: bool) -> Collection[DrawnPart]:
    if not is_crowd:
        return ALL_DRAWN_PARTS
    shapes: DrawnPart = "masks" if has_masks else "boxes"
    return (shapes,)


def _texts(detections: Detections, labels: Sequence[str], parts: Collection[DrawnPart]) -> list[str]:
    names = [labels[label - 1] for label in detections.labels] if "labels" in parts else [""] * len(detections)
    scores = [f"{score:.2f}" for score in detections.scores] if "scores" in parts else [""] * len(detections)
    return [f"{name[:_MAX_NAME_LENGTH]} {score}".strip() for name, score in zip(names, scores, strict=True)]


def _number_of_masks(boxes: Sequence[Rectangle]) -> int:
    """How many masks to draw, best first: at least one."""
    areas = np.array([(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes], np.int64)
    return max(1, int(np.searchsorted(np.cumsum(areas), MAX_MASK_PIXELS, side="right")))


def encode_picture(pixels: UInt8Array, format: Literal["png", "jpeg"]) -> bytes:
    """Encode (H, W, 3) uint8 RGB pixels as an image file."""
    if format == "jpeg":
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, format, quality=92)
        return file.getvalue()
    _, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), _PNG_OPTIONS)
    # Copied in pieces, and joined without the GIL.
    return b"".join([encoded[at : at + _COPIED_BYTES].tobytes() for at in range(0, len(encoded), _COPIED_BYTES)])


def colour_of(index: int) -> Colour:
    """One of 15 distinct RGB colours that stand out on dark and bright pictures; they repeat after that."""
    return _PALETTE[index % len(_PALETTE)]


def _whole_pixels(boxes: Float32Array, image_size: tuple[int, int]) -> list[Rectangle]:
    """Round outwards to pixels: at least one in each direction, and within the picture."""
    height, width = image_size
    x1 = np.clip(np.floor(boxes[:, 0]), 0, width - 1)
    y1 = np.clip(np.floor(boxes[:, 1]), 0, height - 1)
    x2 = np.clip(np.ceil(boxes[:, 2]), x1 + 1, width)
    y2 = np.clip(np.ceil(boxes[:, 3]), y1 + 1, height)
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in zip(x1, y1, x2, y2, strict=True)]


def _draw_mask(canvas: UInt8Array, mask: PastedMask, colour: Colour, line_width: int) -> None:
    """Tint the object and draw its outline."""
    inside = np.ascontiguousarray(mask.pixels)
    height, width = inside.shape
    # Where the object touches the picture's edge, the edge is an outline too.
    square = np.ones((2 * line_width + 1, 2 * line_width + 1), np.uint8)
    core = cv2.erode(inside, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    outline = cv2.subtract(inside, core)
    region = canvas[mask.y : mask.y + height, mask.x : mask.x + width]
    for opacity, where in ((_MASK_OPACITY, core), (_OUTLINE_OPACITY, outline)):
        region[:] = cv2.copyTo(cv2.LUT(region, _blend_table(colour, opacity)), where, region)


def _blend_table(colour: Colour, opacity: float) -> UInt8Array:
    """(1, 256, 3) lookup table: each level of each channel, blended with a colour."""
    levels = np.arange(256)[:, None] * (1 - opacity) + np.array(colour) * opacity
    return np.rint(levels)[None].astype(np.uint8)


def _draw_box(canvas: UInt8Array, box: Rectangle, colour: Colour, line_width: int) -> None:
    """Draw a line along the inner edge of the box, with a shadow inside it, so that it is visible on any background."""
    x1, y1, x2, y2 = box
    region = canvas[y1:y2, x1:x2]
    if min(region.shape[:2]) > 2 * line_width:
        inner = region[line_width:-line_width, line_width:-line_width]
        for edge in _edges(inner, line_width):
            if edge.size:
                edge[:] = cv2.LUT(edge, _SHADOW)
    for edge in _edges(region, line_width):
        edge[:] = colour


def _edges(region: UInt8Array, width: int) -> list[UInt8Array]:
    """The four sides of a region, `width` pixels each, which share no pixel."""
    height, length = region.shape[:2]
    top, left = min(width, height), min(width, length)
    bottom, right = max(top, height - width), max(left, length - width)
    return [region[:top], region[bottom:], region[top:bottom, :left], region[top:bottom, right:]]


def _caption(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, font_size: int) -> _Caption:
    padding = font_size // 4
    return _Caption(text, width=round(font.getlength(text)) + 2 * padding, height=font_size + padding)


def _draw_captions(
    canvas: UInt8Array,
    boxes: Sequence[Rectangle],
    captions: Sequence[_Caption],
    colours: Sequence[Colour],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Write each caption on its colour, above its box or wherever there is room; best first, without overlaps."""
    taken = np.empty((len(boxes), 4), np.int64)
    num_taken = 0
    for box, caption, colour in zip(boxes, captions, colours, strict=True):
        places = _places(box, caption, canvas.shape[:2])
        free = next((place for place in places if not _overlaps_any(place, taken[:num_taken])), None)
        if free is not None:
            taken[num_taken] = free
            num_taken += 1
            _write_caption(canvas, free, caption.text, colour, font)


def _write_caption(
    canvas: UInt8Array,
    place: Rectangle,
    text: str,
    colour: Colour,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    x1, y1, x2, y2 = place
    plate = PIL.Image.new("RGB", (x2 - x1, y2 - y1), colour)
    ImageDraw.Draw(plate).text((plate.width / 2, plate.height / 2), text, fill="black", font=font, anchor="mm")
    region = canvas[y1:y2, x1:x2]
    region[:] = np.asarray(plate)[: region.shape[0], : region.shape[1]]


def _places(box: Rectangle, caption: _Caption, image_size: tuple[int, ...]) -> list[Rectangle]:
    """Places for a caption: above the box, inside its top, or below it; moved sideways to fit the picture."""
    x1, y1, _, y2 = box
    height, width = image_size
    left = max(0, min(x1, width - caption.width))
    tops = [top for top in (y1 - caption.height, y1, y2) if 0 <= top <= height - caption.height]
    return [(left, top, left + caption.width, top + caption.height) for top in tops]


def _overlaps_any(place: Rectangle, taken: NDArray[np.int64]) -> bool:
    x1, y1, x2, y2 = place
    left, top, right, bottom = taken.T
    return bool(((x1 < right) & (left < x2) & (y1 < bottom) & (top < y2)).any())
