"""Convert small masks and their boxes to runs of mask pixels in each image column. The pixels are those of
torchvision's `paste_masks_in_image(masks, boxes, image_size, padding=1) >= threshold`, or those of detectron2's
function of the same name, but only columns covered by a box are visited, and within them only pixels near the mask's
outline.

Both interpolate bilinearly between the mask's cells and a border of zeros around them, and differ in where an image
pixel falls between the cells, which is all that `MaskStyle` decides. torchvision truncates the box to whole pixels and
resizes the mask to them. detectron2 keeps the box as it is and samples the mask at the centers of the pixels.

Shapes: D objects of one image, M x M the mask head's output size. A run is [start, end) in rows of one column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.jit import compiled
from service.structures import Float32Array, Int64Array, MaskStyle

Int32Array = NDArray[np.int32]

# Far above the rounding error of a weighted mean of two probabilities, far below what changes a pixel.
_ROUNDING = np.float32(1e-5)
# Kinds of bands.
_OUTSIDE, _INSIDE, _CROSSED = 0, 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class ColumnRuns:
    """The binary masks of one image, as runs in columns.

    Attributes:
        image_size: (height, width).
        first_x: (D,) image column of each object's first column.
        first_column: (D + 1,) object d owns columns `first_column[d]` to `first_column[d + 1]`.
        first_y: (columns + 1,) column k owns the bounds `ys[first_y[k]:first_y[k + 1]]`.
        ys: start, end, start, end, … of the runs, rising within a column, in rows of the image.
    """

    image_size: tuple[int, int]
    first_x: Int64Array
    first_column: Int64Array
    first_y: Int64Array
    ys: Int32Array

    def __len__(self) -> int:
        return len(self.first_x)

    def of(self, index: int) -> tuple[Int64Array, Int32Array]:
        """One object's share: (columns + 1,) where each of its columns begins, and their bounds, as in `ys`."""
        columns = self.first_y[self.first_column[index] : self.first_column[index + 1] + 1]
        return columns - columns[0], self.ys[columns[0] : columns[-1]]

    def rectangle(self, index: int) -> tuple[int, int, int, int]:
        """The (x, y, height, width) of the smallest rectangle around an object's pixels; all 0 if it has none."""
        columns, ys = self.of(index)
        covered = np.flatnonzero(np.diff(columns))
        if not len(covered):
            return 0, 0, 0, 0
        x, y = int(self.first_x[index] + covered[0]), int(ys.min())
        return x, y, int(ys.max()) - y, int(covered[-1] - covered[0]) + 1


def find_runs(
    masks: Float32Array,
    boxes: Float32Array,
    image_size: tuple[int, int],
    threshold: float = 0.5,
    *,
    style: MaskStyle = "torchvision",
) -> ColumnRuns:
    """Spread each mask over its box and keep the pixels of at least `threshold`.

    Args:
        masks: (D, M, M) float32 probabilities.
        boxes: (D, 4) float32, in pixels of the image; may reach outside.
        image_size: (height, width) of the image.
        threshold: above 0, at most 1; at 0, pixels outside the box would count.
        style: whose function to follow.

    Raises:
        ValueError: other shapes, or a box that is not finite.
    """
    if masks.ndim != 3 or masks.shape[1] != masks.shape[2] or boxes.shape != (len(masks), 4):
        raise ValueError(f"expected masks (D, M, M) and boxes (D, 4), got {masks.shape} and {boxes.shape}")
    if not np.isfinite(boxes).all():
        raise ValueError("expected finite boxes")
    height, width = image_size
    boxes = boxes.astype(np.float32)
    # [object, column, row]: the kernel interpolates whole columns. The border of zeros is torchvision's padding and
    # what detectron2 samples outside.
    padded = np.ascontiguousarray(np.pad(masks.transpose(0, 2, 1), ((0, 0), (1, 1), (1, 1))), np.float32)
    spans = _SPANS[style](boxes, masks.shape[1])
    columns = np.clip(spans[:, 2] + 1, 0, width) - np.clip(spans[:, 0], 0, width)
    first_column = np.concatenate([[0], np.maximum(columns, 0).cumsum()])
    at_centers = style == "detectron2"
    first_y, ys = _find_runs(padded, boxes, spans, at_centers, first_column, height, width, np.float32(threshold))
    return ColumnRuns(image_size, np.clip(spans[:, 0], 0, width), first_column, first_y, ys)


def _expanded_boxes(boxes: Float32Array, mask_size: int) -> Int64Array:
    """(D, 4) the first and last pixels that a mask can reach, in torchvision's style: `expand_boxes` for the padded
    mask, and its truncation towards zero.
    """
    centers = (boxes[:, 2:] + boxes[:, :2]) * np.float32(0.5)
    halves = (boxes[:, 2:] - boxes[:, :2]) * np.float32(0.5) * np.float32((mask_size + 2) / mask_size)
    return np.concatenate([centers - halves, centers + halves], axis=1).astype(np.int64)


def _pixels_around(boxes: Float32Array, mask_size: int) -> Int64Array:
    """The same in detectron2's style: all pixels within half a cell of the box."""
    margins = (boxes[:, 2:] - boxes[:, :2]) / (2 * mask_size)
    spans = np.concatenate([boxes[:, :2] - margins, boxes[:, 2:] + margins], axis=1).astype(np.int64)
    # An empty box would divide by zero.
    spans[~(boxes[:, 2:] > boxes[:, :2]).all(axis=1)] = 0, 0, -1, -1
    return spans


_SPANS: Mapping[MaskStyle, Callable[[Float32Array, int], Int64Array]] = {
    "torchvision": _expanded_boxes,
    "detectron2": _pixels_around,
}


@compiled()
def _find_runs(
    masks: Float32Array,
    boxes: Float32Array,
    spans: Int64Array,
    at_centers: bool,
    first_column: Int64Array,
    height: int,
    width: int,
    threshold: np.float32,
) -> tuple[Int64Array, Int32Array]:
    size = masks.shape[1]
    first_y = np.zeros(first_column[-1] + 1, np.int64)
    ys = np.empty(4 * len(first_y), np.int32)
    count = 0
    for d in range(len(boxes)):
        left, top, right, bottom = spans[d]
        if at_centers:
            x_cells, x_weights = _cells_at_centers(boxes[d, 0], boxes[d, 2], left, right, width, size)
            y_cells, y_weights = _cells_at_centers(boxes[d, 1], boxes[d, 3], top, bottom, height, size)
        else:
            x_cells, x_weights = _source_cells(left, right, width, size)
            y_cells, y_weights = _source_cells(top, bottom, height, size)
        first_row = np.zeros(size + 1, np.int64)
        for cell in y_cells:
            first_row[cell + 1] += 1
        ends = first_y[first_column[d] + 1 : first_column[d + 1] + 1]
        first_row = first_row.cumsum()
        mask, y = masks[d], max(top, 0)
        number = _append_runs(mask, x_cells, x_weights, first_row, y_weights, y, threshold, ys, count, ends)
        while number < 0:
            grown = np.empty(2 * len(ys) + len(y_cells) + 1, np.int32)
            grown[:count] = ys[:count]
            ys = grown
            number = _append_runs(mask, x_cells, x_weights, first_row, y_weights, y, threshold, ys, count, ends)
        count = number
    return first_y, ys[:count].copy()


@compiled()
def _source_cells(first: int, last: int, limit: int, size: int) -> tuple[Int64Array, Float32Array]:
    """For the pixels of [first, last] inside [0, limit): the mask cell before each, and the weight of the next one.

    Bilinear interpolation of the padded mask with `align_corners=False`, rounded like torch.
    """
    begin = max(first, 0)
    length = max(min(last + 1, limit) - begin, 0)
    cells = np.empty(length, np.int64)
    weights = np.empty(length, np.float32)
    scale = np.float32(size) / np.float32(max(last + 1 - first, 1))
    for i in range(length):
        source = max(_fma(scale, np.float32(begin - first + i) + np.float32(0.5), np.float32(-0.5)), np.float32(0))
        cells[i] = min(int(source), size - 1)
        weights[i] = min(source - np.float32(cells[i]), np.float32(1))
    return cells, weights


@compiled()
def _cells_at_centers(
    low: np.float32, high: np.float32, first: int, last: int, limit: int, size: int
) -> tuple[Int64Array, Float32Array]:
    """The same, where the box [low, high] covers the mask without its border, as in detectron2's `_do_paste_mask` and
    `grid_sample`, step by step in float32.

    Args:
        size: of the padded mask.
    """
    begin = max(first, 0)
    length = max(min(last + 1, limit) - begin, 0)
    cells = np.empty(length, np.int64)
    weights = np.empty(length, np.float32)
    one, half, two = np.float32(1), np.float32(0.5), np.float32(2)
    for i in range(length):
        grid = (np.float32(begin + i) + half - low) / (high - low) * two - one
        source = ((grid + one) * np.float32(size - 2) - one) / two
        before = np.floor(source)
        cells[i] = min(max(int(before) + 1, 0), size - 1)
        weights[i] = source - before if -one <= before < np.float32(size - 1) else np.float32(0)
    return cells, weights


@compiled()
def _find_bands(
    mask: Float32Array, near: int, far: int, first_row: Int64Array, threshold: np.float32, bands: Int64Array
) -> int:
    """Divide the rows of the mask into bands, between its columns `near` and `far`: one for each row that the outline
    may cross, and one for all rows in between that are wholly inside the outline, or wholly outside.

    Args:
        bands: filled with the first row of each band and its kind.

    Returns:
        How many bands there are.
    """
    above, below = threshold + _ROUNDING, threshold - _ROUNDING
    number = 0
    for row in range(len(mask)):
        if first_row[row] == first_row[row + 1]:
            continue
        after = min(row + 1, len(mask) - 1)
        a, b, c, d = mask[near, row], mask[near, after], mask[far, row], mask[far, after]
        # Whatever is interpolated between the four lies between them.
        kind = _CROSSED
        if a > above and b > above and c > above and d > above:
            kind = _INSIDE
        elif a < below and b < below and c < below and d < below:
            kind = _OUTSIDE
        if number == 0 or kind == _CROSSED or kind != bands[number - 1, 1]:
            bands[number, 0], bands[number, 1] = row, kind
            number += 1
    return number


@compiled()
def _append_runs(
    mask: Float32Array,
    x_cells: Int64Array,
    x_weights: Float32Array,
    first_row: Int64Array,
    y_weights: Float32Array,
    top: int,
    threshold: np.float32,
    ys: Int32Array,
    count: int,
    ends: Int64Array,
) -> int:
    """Append the run bounds of one object to `ys`. One function for all columns, since numba counts references to the
    arrays that are passed to a function, by atomic operations.

    Args:
        mask: (M, M) by column and row.
        first_row: (M + 1,) row r of the mask has the pixels from `first_row[r]` to `first_row[r + 1]`.
        count: how many bounds `ys` has.
        ends: filled with how many it has after each column.

    Returns:
        How many it has then; -1 if `ys` is too short.
    """
    above, below = threshold + _ROUNDING, threshold - _ROUNDING
    size = len(mask)
    bands = np.empty((size, 2), np.int64)
    near, far, number = -1, -1, 0
    for x in range(len(x_cells)):
        if x_cells[x] != near:
            near = x_cells[x]
            far = min(near + 1, size - 1)
            number = _find_bands(mask, near, far, first_row, threshold, bands)
        if count + len(y_weights) + 1 > len(ys):
            return -1
        inside = False
        for band in range(number):
            row, kind = bands[band, 0], bands[band, 1]
            begin, end = first_row[row], first_row[row + 1]
            is_above = kind == _INSIDE
            if kind == _CROSSED:
                after = min(row + 1, size - 1)
                low = _mix(mask[near, row], mask[far, row], x_weights[x])
                high = _mix(mask[near, after], mask[far, after], x_weights[x])
                is_above = low > above and high > above
                if not is_above and not (low < below and high < below):
                    # The probability is linear in between: only pixels next to the crossing are in doubt. Finding it
                    # takes as long as trying some pixels.
                    first, last = begin, end
                    rise = high - low
                    span = y_weights[end - 1] - y_weights[begin]
                    if end - begin > 8 and abs(rise) > np.float32(1e-3) and span > 0:
                        crossing, margin = (threshold - low) / rise, np.float32(2) * _ROUNDING / abs(rise)
                        steps = int((crossing - y_weights[begin]) / span * np.float32(end - begin - 1))
                        first = min(max(begin + steps, begin), end - 1)
                        while first > begin and y_weights[first - 1] > crossing - margin:
                            first -= 1
                        last = first
                        while last < end and y_weights[last] < crossing + margin:
                            last += 1
                        if first > begin and inside != (rise < 0):
                            inside = not inside
                            ys[count] = top + begin
                            count += 1
                    for y in range(first, last):
                        if inside != (_mix(low, high, y_weights[y]) >= threshold):
                            inside = not inside
                            ys[count] = top + y
                            count += 1
                    if last < end and inside != (rise > 0):
                        inside = not inside
                        ys[count] = top + last
                        count += 1
                    continue
            if inside != is_above:
                inside = not inside
                ys[count] = top + begin
                count += 1
        if inside:
            ys[count] = top + len(y_weights)
            count += 1
        ends[x] = count
    return count


@compiled()
def _mix(near: np.float32, far: np.float32, weight: np.float32) -> np.float32:
    return _fma(np.float32(1) - weight, near, weight * far)


@compiled()
def _fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """`a * b + c`, rounded once, as torch's compiler emits it: on hard edges the last bit decides."""
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))
