"""Draw what was found on the picture: masks, boxes, captions. Called by `pipeline.py` in a thread. Knows pixels and
detections; knows no models.

Shapes: D detections of one image, M x M the mask head's output size, H x W the image. Boxes are (x1, y1, x2, y2).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont

from service.structures import Detections, Float32Array, Image, UInt8Array

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # x1, y1, x2, y2 in whole pixels, the last two exclusive

_MASK_OPACITY = 0.4
_OUTLINE_OPACITY = 0.9
_SHADOW_OPACITY = 0.4
# Above this share of the picture, captions would hide more than they tell.
_MAX_CAPTION_SHARE = 0.2
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
    """A text and the room that it takes, in pixels."""

    text: str
    width: int
    height: int


def draw_detections(image: Image, detections: Detections, labels: Sequence[str]) -> UInt8Array:
    """Draw masks, boxes and captions (label and score) over a copy of the picture.

    Each label has its own colour, the same in every picture. Where a model with masks knows but one label, each object
    has its own, so that touching ones can be told apart. Better scores lie on top. In a crowd there are no captions,
    and no boxes either if there are masks.

    Args:
        labels: class names; `labels[i]` has the id i + 1.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    canvas = image.pixels.copy()
    font_size = max(11, round(min(image.size) / 36))
    line_width = max(1, round(min(image.size) / 300))
    font = ImageFont.load_default(font_size)
    captions = [
        _caption(f"{labels[label - 1]} {score:.2f}", font, font_size)
        for label, score in zip(detections.labels, detections.scores, strict=True)
    ]
    is_crowd = sum(caption.width * caption.height for caption in captions) > _MAX_CAPTION_SHARE * canvas[..., 0].size
    is_by_object = detections.masks is not None and len(labels) == 1
    colours = [colour_of(i if is_by_object else int(label) - 1) for i, label in enumerate(detections.labels)]
    boxes = _whole_pixels(detections.boxes, image.size)
    for i in reversed(range(len(detections))):
        if detections.masks is not None:
            _draw_mask(canvas, boxes[i], detections.masks[i], colours[i], line_width)
        if detections.masks is None or not is_crowd:
            _draw_box(canvas, boxes[i], colours[i], line_width)
    return canvas if is_crowd else _draw_captions(canvas, boxes, captions, colours, font)


def encode_picture(pixels: UInt8Array, format: Literal["png", "jpeg"]) -> bytes:
    """Encode (H, W, 3) uint8 RGB pixels as an image file."""
    file = io.BytesIO()
    options = {"compress_level": 3} if format == "png" else {"quality": 92}
    PIL.Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def colour_of(index: int) -> Colour:
    """One of 15 RGB colours that differ well and show on dark and on bright pictures; then they begin again."""
    return _PALETTE[index % len(_PALETTE)]


def _whole_pixels(boxes: Float32Array, image_size: tuple[int, int]) -> list[Rectangle]:
    """Round outwards to pixels: at least one in each direction, and within the picture."""
    height, width = image_size
    x1 = np.clip(np.floor(boxes[:, 0]), 0, width - 1)
    y1 = np.clip(np.floor(boxes[:, 1]), 0, height - 1)
    x2 = np.clip(np.ceil(boxes[:, 2]), x1 + 1, width)
    y2 = np.clip(np.ceil(boxes[:, 3]), y1 + 1, height)
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in zip(x1, y1, x2, y2, strict=True)]


def _draw_mask(canvas: UInt8Array, box: Rectangle, mask: Float32Array, colour: Colour, line_width: int) -> None:
    """Tint the object and draw its outline, within its box."""
    x1, y1, x2, y2 = box
    inside = (cv2.resize(mask, (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR) >= 0.5).astype(np.uint8)
    # The box's edge is an outline too, where the object reaches it.
    core = cv2.erode(
        inside, np.ones((3, 3), np.uint8), iterations=line_width, borderType=cv2.BORDER_CONSTANT, borderValue=0
    )
    opacity = np.where(core > 0, _MASK_OPACITY, _OUTLINE_OPACITY * inside)[..., None]
    region = canvas[y1:y2, x1:x2]
    region[:] = np.rint(region * (1 - opacity) + np.array(colour) * opacity)


def _draw_box(canvas: UInt8Array, box: Rectangle, colour: Colour, line_width: int) -> None:
    """Draw a line along the inner edge of the box, and a shadow inside it, so that it shows on any background."""
    x1, y1, x2, y2 = box
    region = canvas[y1:y2, x1:x2]
    shadow = _frame(region, 2 * line_width)
    region[shadow] = region[shadow] * (1 - _SHADOW_OPACITY)
    region[_frame(region, line_width)] = colour


def _frame(region: UInt8Array, width: int) -> NDArray[np.bool_]:
    frame = np.ones(region.shape[:2], np.bool_)
    frame[width:-width, width:-width] = False
    return frame


def _caption(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, font_size: int) -> _Caption:
    padding = font_size // 4
    return _Caption(text, width=round(font.getlength(text)) + 2 * padding, height=font_size + padding)


def _draw_captions(
    canvas: UInt8Array,
    boxes: Sequence[Rectangle],
    captions: Sequence[_Caption],
    colours: Sequence[Colour],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> UInt8Array:
    """Write each caption on its colour, above its box or where else there is room; best first, none over another."""
    picture = PIL.Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    taken: list[Rectangle] = []
    for box, caption, colour in zip(boxes, captions, colours, strict=True):
        free = [place for place in _places(box, caption, canvas.shape[:2]) if not _overlaps_any(place, taken)]
        if free:
            x1, y1, x2, y2 = free[0]
            taken.append(free[0])
            draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colour)
            draw.text(((x1 + x2) / 2, (y1 + y2) / 2), caption.text, fill="black", font=font, anchor="mm")
    return np.array(picture)


def _places(box: Rectangle, caption: _Caption, image_size: tuple[int, ...]) -> list[Rectangle]:
    """Where a caption may stand: above the box, in its top, below it; moved sideways into the picture."""
    x1, y1, _, y2 = box
    height, width = image_size
    left = max(0, min(x1, width - caption.width))
    tops = [top for top in (y1 - caption.height, y1, y2) if 0 <= top <= height - caption.height]
    return [(left, top, left + caption.width, top + caption.height) for top in tops]


def _overlaps_any(place: Rectangle, taken: Sequence[Rectangle]) -> bool:
    x1, y1, x2, y2 = place
    return any(x1 < right and left < x2 and y1 < bottom and top < y2 for left, top, right, bottom in taken)
