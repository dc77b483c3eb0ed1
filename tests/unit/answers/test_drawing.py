"""Drawings show the masks that the JSON has."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import get_args

import numpy as np
import PIL.Image
import pytest
from pycocotools import mask as coco

from service.answers import encode
from service.masks.rle import encode_rle
from service.structures import Detections, Drawing, Image, MaskStyle
from tests.fakes import FAKE_INFO
from tests.unit.masks.cases import objects


@pytest.mark.parametrize("style", get_args(MaskStyle))
def test_drawn_masks_have_the_pixels_of_the_rle(style: MaskStyle) -> None:
    image = Image(np.full((150, 200, 3), 100, np.uint8))
    masks, boxes = objects(1, image.size)
    # Mask by mask, each on a clean picture.
    for mask, box, rle in zip(masks, boxes, encode_rle(masks, boxes, image.size, style=style), strict=True):
        found = Detections(box[None], np.array([1]), np.array([0.9], np.float32), mask[None])
        info = replace(FAKE_INFO, mask_style=style)
        file = encode(Drawing("image/png", parts=("masks",)), image, found, info)
        differs = (np.asarray(PIL.Image.open(io.BytesIO(file))) != 100).any(axis=2)
        expected = coco.decode(rle).astype(bool)
        assert np.array_equal(differs, expected) or not expected.any()
