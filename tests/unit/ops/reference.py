"""The RoI operators once more, as plain loops over NumPy float64: slow, and short enough to be seen to be right.

All take `input` (N, C, H, W), `rois` (K, 5) as (image index, x1, y1, x2, y2) and return (K, C, h, w). Inside, `planes`
are the (C, H, W) features of one image. A box that is inside out counts as an empty one at (x1, y1).
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Size = tuple[int, int]
Reduce = Callable[[Array], Array]


def roi_pool(input: Array, rois: Array, size: Size, scale: float) -> Array:
    def patch(planes: Array, x1: float, y1: float, x2: float, y2: float) -> list[list[Array]]:
        rows = cells_of_bins(round_half_away(y1), round_half_away(y2), size[0])
        columns = cells_of_bins(round_half_away(x1), round_half_away(x2), size[1])
        return [[largest(planes, ys, xs) for xs in columns] for ys in rows]

    return patches(input, rois, size, scale, patch)


def roi_align(
    input: Array, rois: Array, size: Size, scale: float, ratio: int, aligned: bool, reduce: Reduce | None = None
) -> Array:
    def patch(planes: Array, x1: float, y1: float, x2: float, y2: float) -> list[list[Array]]:
        rows, columns = points_of_bins(y1, y2, size[0], ratio, aligned), points_of_bins(x1, x2, size[1], ratio, aligned)
        return [[over_points(planes, ys, xs, reduce or mean) for xs in columns] for ys in rows]

    return patches(input, rois, size, scale, patch)


def roi_align_max(input: Array, rois: Array, size: Size, scale: float, ratio: int, aligned: bool) -> Array:
    return roi_align(input, rois, size, scale, ratio, aligned, reduce=lambda values: values.max(axis=0))


def roi_warp(input: Array, rois: Array, size: Size, scale: float, ratio: int, aligned: bool) -> Array:
    rounded = [[index, *(round_half_away(value * scale) for value in box)] for index, *box in rois.tolist()]
    return roi_align(input, np.array(rounded).reshape(-1, 5), size, 1.0, ratio, aligned)


def spp(input: Array, rois: Array, grids: Iterable[int], scale: float) -> Array:
    levels = [roi_pool(input, rois, (g, g), scale).reshape(len(rois), input.shape[1], g * g) for g in grids]
    return np.concatenate(levels, axis=2)[..., np.newaxis]


def crop(input: Array, rois: Array, size: Size, scale: float, padding: int) -> Array:
    def positions(start: float, end: float, side: int) -> list[float]:
        # The box fills the output but for `padding` pixels at both ends; pixel i has its middle at i + 0.5.
        return [start + (i + 0.5 - padding) / (side - 2 * padding) * (end - start) - 0.5 for i in range(side)]

    def patch(planes: Array, x1: float, y1: float, x2: float, y2: float) -> list[list[Array]]:
        xs = positions(x1, x2, size[1])
        return [[interpolate(planes, y, x) for x in xs] for y in positions(y1, y2, size[0])]

    return patches(input, rois, size, scale, patch)


def patches(
    input: Array,
    rois: Array,
    size: Size,
    scale: float,
    patch: Callable[[Array, float, float, float, float], list[list[Array]]],
) -> Array:
    output = np.zeros((len(rois), input.shape[1], *size))
    for k, (index, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (value * scale for value in box)
        output[k] = np.moveaxis(np.array(patch(input[int(index)], x1, y1, max(x1, x2), max(y1, y2))), 2, 0)
    return output


def interpolate(planes: Array, y: float, x: float) -> Array:
    """The sum of all cells, each weighted by a tent of width 1 around it (MNC's interpolation); 0 outside the map."""
    tent_y = np.maximum(0, 1 - np.abs(y - np.arange(planes.shape[1])))
    tent_x = np.maximum(0, 1 - np.abs(x - np.arange(planes.shape[2])))
    values: Array = tent_y @ planes @ tent_x
    return values


def read(planes: Array, y: float, x: float) -> Array:
    """As `interpolate`, but the border goes on for one cell, as RoI Align has it."""
    channels, height, width = planes.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(channels)
    return interpolate(planes, min(max(y, 0), height - 1), min(max(x, 0), width - 1))


def over_points(planes: Array, ys: list[float], xs: list[float], reduce: Reduce) -> Array:
    values = [read(planes, y, x) for y in ys for x in xs]
    return reduce(np.array(values)) if values else np.zeros(len(planes))


def mean(values: Array) -> Array:
    return np.asarray(values.mean(axis=0))


def points_of_bins(start: float, end: float, bins: int, ratio: int, aligned: bool) -> list[list[float]]:
    length = end - start if aligned else max(end - start, 1)
    count = ratio or math.ceil(length / bins)
    first = start - 0.5 if aligned else start
    return [[first + (i + (k + 0.5) / count) * length / bins for k in range(count)] for i in range(bins)]


def cells_of_bins(first: int, last: int, bins: int) -> list[range]:
    count = max(last - first + 1, 1)
    return [range(first + i * count // bins, first - -(i + 1) * count // bins) for i in range(bins)]


def largest(planes: Array, ys: range, xs: range) -> Array:
    _, height, width = planes.shape
    values = [planes[:, y, x] for y in ys for x in xs if 0 <= y < height and 0 <= x < width]
    return np.max(values, axis=0) if values else np.zeros(len(planes))


def round_half_away(value: float) -> int:
    return int(math.copysign(math.floor(abs(value) + 0.5), value))
