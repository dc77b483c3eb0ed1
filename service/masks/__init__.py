"""Encode a small mask and its box as RLE, polygons, PNG, pixels and what annotation tools take, without rendering the
mask at image size.
"""

from __future__ import annotations

import numpy as np

from service.masks.bitmap import find_bitmaps
from service.masks.brush import encode_brush
from service.masks.paste import paste_mask
from service.masks.png import encode_crops
from service.masks.polygons import encode_polygons
from service.masks.rle import encode_rle


def warm_up() -> None:
    """Compile every encoder's loops, or load them from numba's cache, so that the first request need not wait."""
    masks, boxes = np.ones((1, 2, 2), np.float32), np.array([[0, 0, 2, 2]], np.float32)
    for encode in (encode_rle, encode_polygons, encode_crops, encode_brush):
        encode(masks, boxes, (2, 2))
    for bitmap in find_bitmaps(masks, boxes, (2, 2)):
        list(bitmap.write())
    paste_mask(masks[0], boxes[0], (2, 2))
