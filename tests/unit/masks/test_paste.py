"""Masks as pixels: those of the RLE, cut out."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from pycocotools import mask as coco

from service.masks.paste import paste_mask
from service.masks.rle import encode_rle
from service.structures import MaskStyle
from tests.unit.masks.cases import drawn, objects


@pytest.mark.parametrize("style", get_args(MaskStyle))
@pytest.mark.parametrize("image_size", [(90, 120), (1, 1), (1, 3000), (3000, 1)])
def test_pixels_are_those_of_the_rle_in_the_smallest_rectangle(image_size: tuple[int, int], style: MaskStyle) -> None:
    masks, boxes = objects(3, image_size)
    decoded = coco.decode(encode_rle(masks, boxes, image_size, style=style)).transpose(2, 0, 1)
    assert decoded.any()
    for expected, mask, box in zip(decoded, masks, boxes, strict=True):
        pasted = paste_mask(mask, box, image_size, style=style)
        height, width = pasted.pixels.shape
        canvas = np.zeros_like(expected)
        canvas[pasted.y : pasted.y + height, pasted.x : pasted.x + width] = pasted.pixels
        assert np.array_equal(canvas, expected)
        assert not pasted.pixels.size or all(
            edge.any() for edge in (pasted.pixels[0], pasted.pixels[-1], pasted.pixels[:, 0], pasted.pixels[:, -1])
        )


def test_an_empty_mask_has_no_pixels() -> None:
    masks, boxes, image_size = drawn(["..", ".."])
    assert paste_mask(masks[0], boxes[0], image_size).pixels.shape == (0, 0)
