"""Masks as pixels, for drawing: the rectangle that holds one, never a canvas of the image's size."""

from __future__ import annotations

import numpy as np

from service.jit import compiled
from service.masks._runs import Int32Array, find_runs
from service.structures import Float32Array, Int64Array, MaskStyle, PastedMask, UInt8Array


def paste_mask(
    mask: Float32Array,
    box: Float32Array,
    image_size: tuple[int, int],
    *,
    style: MaskStyle = "torchvision",
) -> PastedMask:
    """Spread one mask over its box and keep the pixels of at least 0.5.

    Args:
        mask: (M, M) float32 probabilities.
        box: (4,) float32, in pixels of the image; may reach outside.
        image_size: (height, width).
        style: whose `paste_masks_in_image` to follow.

    Raises:
        ValueError: other shapes, or a box that is not finite.
    """
    runs = find_runs(mask[None], box[None], image_size, style=style)
    x, y, height, width = runs.rectangle(0)
    columns, ys = runs.of(0)
    first = x - int(runs.first_x[0])
    by_column = np.zeros((width, height), np.uint8)
    _fill(columns[first : first + width + 1], ys, y, by_column)
    return PastedMask(x, y, by_column.T)


@compiled()
def _fill(columns: Int64Array, ys: Int32Array, top: int, by_column: UInt8Array) -> None:
    for x in range(len(by_column)):
        for i in range(columns[x], columns[x + 1], 2):
            by_column[x, ys[i] - top : ys[i + 1] - top] = 1
