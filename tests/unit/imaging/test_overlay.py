"""Detections drawn on pictures that are small enough to look at each pixel."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from service.errors import CancelledRequestError
from service.imaging import overlay
from service.imaging.overlay import colour_of, draw_detections, encode_picture
from service.structures import Detections, DrawnPart, Image, PastedMask, UInt8Array


def grey(height: int, width: int, level: int = 100) -> Image:
    return Image(np.full((height, width, 3), level, np.uint8))


def found(
    *boxes: tuple[float, float, float, float], labels: list[int] | None = None, mask: list[list[float]] | None = None
) -> Detections:
    count = len(boxes)
    return Detections(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels or [1] * count, np.int64),
        scores=np.linspace(0.9, 0.5, count, dtype=np.float32),
        masks=None if mask is None else np.array([mask] * count, np.float32),
    )


def draw(image: Image, detections: Detections, labels: list[str], **options: Any) -> UInt8Array:
    """Draw masks that fill their boxes, in whole pixels."""
    masks = detections.masks

    def paste(i: int) -> PastedMask:
        assert masks is not None
        x1, y1, x2, y2 = overlay._whole_pixels(detections.boxes[i : i + 1], image.size)[0]
        pixels = (cv2.resize(masks[i], (x2 - x1, y2 - y1)) >= 0.5).astype(np.uint8)
        return PastedMask(x1, y1, pixels if pixels.any() else pixels[:0, :0])

    return draw_detections(image, detections, labels, paste=None if masks is None else paste, **options)


def changed(drawn: UInt8Array, image: Image) -> NDArray[np.bool_]:
    differs: NDArray[np.bool_] = (drawn != image.pixels).any(axis=2)
    return differs


def is_ink(drawn: UInt8Array) -> NDArray[np.bool_]:
    """Where letters are: darker than the shadow of a line."""
    dark: NDArray[np.bool_] = drawn.max(axis=2) < 55
    return dark


def test_nothing_found_changes_nothing() -> None:
    image = grey(20, 30)
    assert np.array_equal(draw(image, found(), ["cell"]), image.pixels)


def test_the_picture_itself_is_not_drawn_on() -> None:
    image = grey(20, 30)
    draw(image, found((2, 2, 9, 9)), ["cell"])
    assert (image.pixels == 100).all()


def test_a_box_is_a_line_on_its_inner_edge_and_a_shadow_inside() -> None:
    """A crowd for a picture this small, so no caption is in the way."""
    image = grey(8, 8)
    drawn = draw(image, found((1, 1, 7, 7)), ["cell"])
    picture = [
        "........",
        ".######.",
        ".#++++#.",
        ".#+..+#.",
        ".#+..+#.",
        ".#++++#.",
        ".######.",
        "........",
    ]
    marks = {".": (100, 100, 100), "+": (60, 60, 60), "#": colour_of(0)}
    assert drawn.tolist() == [[list(marks[mark]) for mark in row] for row in picture]


def test_a_mask_tints_its_pixels_and_nothing_else() -> None:
    image = grey(12, 12)
    drawn = draw(image, found((2, 2, 10, 10), mask=[[0.9, 0.1], [0.9, 0.1]]), ["cell"])
    inside = np.zeros((12, 12), np.bool_)
    inside[2:10, 2:6] = True
    assert np.array_equal(changed(drawn, image), inside)
    tint = np.rint(0.6 * 100 + 0.4 * np.array(colour_of(0)))
    assert np.abs(drawn[5, 3] - tint).max() <= 1


def test_labels_have_their_own_colours_in_every_picture() -> None:
    boxes = [(1.0, 1.0, 20.0, 20.0), (30.0, 1.0, 50.0, 20.0)]
    drawn = draw(grey(60, 60), found(*boxes, labels=[2, 1]), ["cell", "platelet"])
    assert drawn[19, 1].tolist() == list(colour_of(1))
    assert drawn[19, 30].tolist() == list(colour_of(0))


def test_objects_of_the_only_label_are_told_apart_by_colour_where_there_are_masks() -> None:
    boxes = [(1.0, 1.0, 20.0, 20.0), (20.0, 1.0, 40.0, 20.0)]
    drawn = draw(grey(60, 60), found(*boxes, mask=[[1.0]]), ["nucleus"])
    assert drawn[10, 5].tolist() != drawn[10, 30].tolist()
    without = draw(grey(60, 60), found(*boxes), ["nucleus"])
    assert without[19, 1].tolist() == without[19, 20].tolist() == list(colour_of(0))


def test_the_better_score_lies_on_top() -> None:
    boxes = [(10.0, 10.0, 30.0, 30.0), (20.0, 10.0, 50.0, 30.0)]
    drawn = draw(grey(60, 60), found(*boxes, labels=[1, 2]), ["a", "b"])
    assert drawn[29, 25].tolist() == list(colour_of(0))


def test_a_caption_stands_above_its_box_or_in_it_at_the_picture_s_top() -> None:
    above = draw(grey(400, 400), found((100, 100, 300, 300)), ["cell"])
    assert changed(above, grey(400, 400))[:100].any()
    inside = draw(grey(400, 400), found((100, 0, 300, 300)), ["cell"])
    assert is_ink(inside)[3:12, 104:130].any(), "letters below the box's upper edge"


def test_captions_do_not_cover_each_other() -> None:
    """Three equal boxes: one caption above, one in the top, one below."""
    drawn = draw(grey(400, 400), found(*[(100, 100, 300, 200)] * 3), ["cell"])
    rows = np.flatnonzero(is_ink(drawn).any(axis=1))
    assert np.count_nonzero(np.diff(rows) > 3) == 2, "three lines of letters"


@pytest.mark.parametrize("mask", [None, [[1.0]]])
def test_a_crowd_has_no_captions(mask: list[list[float]] | None) -> None:
    """300 objects of 8 x 8 pixels: everything that changes lies in a box."""
    boxes = [(12.0 * x, 12.0 * y, 12.0 * x + 8, 12.0 * y + 8) for y in range(15) for x in range(20)]
    image = grey(256, 256)
    outside = np.ones((256, 256), np.bool_)
    for x1, y1, x2, y2 in boxes:
        outside[int(y1) : int(y2), int(x1) : int(x2)] = False
    drawn = changed(draw(image, found(*boxes, mask=mask), ["nucleus"]), image)
    assert not (drawn & outside).any()
    assert drawn.sum() > 300 * 20


@pytest.mark.parametrize(
    "box", [(0, 0, 1, 1), (0, 0, 0.2, 0.2), (39.7, 29.9, 40, 30), (0, 0, 40, 30), (0, 10, 40, 10.5), (39, 0, 40, 30)]
)
@pytest.mark.parametrize("mask", [None, [[0.6] * 28] * 28])
def test_thin_boxes_and_boxes_at_the_border_are_drawn(
    box: tuple[float, float, float, float], mask: list[list[float]] | None
) -> None:
    image = grey(30, 40)
    assert changed(draw(image, found(box, mask=mask), ["a", "b"]), image).any()


def test_one_pixel_is_picture_enough() -> None:
    assert draw(grey(1, 1), found((0, 0, 1, 1), mask=[[1.0]]), ["cell"]).shape == (1, 1, 3)


def test_lines_grow_with_the_picture() -> None:
    image = grey(1200, 1200)
    drawn = draw(image, found((100, 100, 1100, 1100)), ["cell"])
    line = (drawn[600] == colour_of(0)).all(axis=1)
    assert line[:600].sum() == 4


def test_colours_differ_and_are_bright_enough_for_black_letters() -> None:
    colours = np.array([colour_of(i) for i in range(15)])
    distances = np.abs(colours[:, None] - colours).sum(axis=2) + 1000 * np.eye(15, dtype=int)
    assert distances.min() > 80
    assert (colours @ [0.299, 0.587, 0.114]).min() > 110
    assert colour_of(15) == colour_of(0)


def test_pictures_are_encoded_in_both_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay, "_COPIED_BYTES", 50)
    pixels = np.arange(10 * 20 * 3, dtype=np.uint8).reshape(10, 20, 3)
    png = PIL.Image.open(io.BytesIO(encode_picture(pixels, "png")))
    assert png.format == "PNG"
    assert np.array_equal(np.asarray(png), pixels)
    jpeg = PIL.Image.open(io.BytesIO(encode_picture(pixels, "jpeg")))
    assert (jpeg.format, jpeg.size) == ("JPEG", (20, 10))


def reference_mask(image: Image, box: tuple[int, int, int, int], mask: list[list[float]], width: int) -> UInt8Array:
    """As written first: repeated small erosions, and floating point over the whole mask."""
    x1, y1, x2, y2 = box
    inside = (cv2.resize(np.array(mask, np.float32), (x2 - x1, y2 - y1)) >= 0.5).astype(np.uint8)
    core = cv2.erode(inside, np.ones((3, 3), np.uint8), None, (-1, -1), width, cv2.BORDER_CONSTANT, 0)
    opacity = np.where(core > 0, 0.4, 0.9 * inside)[..., None]
    drawn = image.pixels.copy()
    drawn[y1:y2, x1:x2] = np.rint(drawn[y1:y2, x1:x2] * (1 - opacity) + np.array(colour_of(0)) * opacity)
    return drawn


def test_masks_are_blended_to_the_same_pixels_as_in_floating_point() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1300, 1400, 3), dtype=np.uint8)
    image = Image(pixels)
    mask = [[1.0 - ((x - 6.5) / 7) ** 2 - ((y - 6.5) / 7) ** 2 for x in range(14)] for y in range(14)]
    drawn = draw(image, found((100, 200, 1300, 1100), mask=mask), ["a", "b"], parts=["masks"])
    assert np.array_equal(drawn, reference_mask(image, (100, 200, 1300, 1100), mask, width=4))


def test_only_the_parts_that_are_asked_for_are_drawn() -> None:
    image = grey(400, 400)
    objects = found((100, 100, 300, 300), mask=[[1.0]])
    boxes = changed(draw(image, objects, ["cell", "b"], parts=["boxes"]), image)
    assert not boxes[150:250, 150:250].any(), "no tint"
    assert not boxes[:100].any(), "no caption"
    masks = changed(draw(image, objects, ["cell", "b"], parts=["masks"]), image)
    assert masks[100:300, 100:300].all()
    assert masks.sum() == 200 * 200
    captions: list[list[DrawnPart]] = [["labels"], ["scores"], ["labels", "scores"]]
    widths = [changed(draw(image, objects, ["cell", "b"], parts=parts), image)[:100].sum() for parts in captions]
    assert 0 < widths[0] < widths[2] > widths[1] > 0


def test_captions_that_are_asked_for_are_written_even_in_a_crowd_as_far_as_there_is_room() -> None:
    boxes = [(12.0 * x, 12.0 * y, 12.0 * x + 8, 12.0 * y + 8) for y in range(15) for x in range(20)]
    drawn = draw(grey(256, 256), found(*boxes, mask=[[1.0]]), ["nucleus"], parts=["masks", "labels"])
    assert is_ink(drawn).any()


def test_many_large_masks_paint_a_bounded_number_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best ones are drawn; of the rest the boxes."""
    painted = 0

    def count(canvas: UInt8Array, mask: PastedMask, *rest: object) -> None:
        nonlocal painted
        painted += mask.pixels.size

    monkeypatch.setattr(overlay, "_draw_mask", count)
    monkeypatch.setattr(overlay, "MAX_MASK_PIXELS", 100_000)
    image = grey(200, 200)
    drawn = draw(image, found(*[(10, 10, 190, 190)] * 20, mask=[[1.0]]), ["cell"], parts=["masks"])
    assert painted == 3 * 180 * 180
    assert changed(drawn, image).any(), "the boxes of the others"


def test_an_object_whose_mask_has_no_pixels_is_drawn_as_its_box() -> None:
    image = grey(200, 200)
    objects = found((10, 10, 60, 60), (100, 100, 190, 190), mask=[[0.1]])
    assert changed(draw(image, objects, ["cell"], parts=["masks"]), image)[100:190, 100].all()
    assert not changed(draw(image, objects, ["cell"], parts=["labels"]), image)[110:180, 110:180].any()


def test_drawing_stops_between_objects_when_nobody_waits() -> None:
    asked = iter([False, False, True])
    with pytest.raises(CancelledRequestError):
        draw(grey(50, 50), found(*[(10, 10, 40, 40)] * 9), ["cell"], should_stop=lambda: next(asked))
    assert next(asked, None) is None
