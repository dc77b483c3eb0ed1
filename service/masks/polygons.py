"""Masks as COCO polygons that run along the edges of the pixels, so that filling them gives back the mask exactly.
Knows runs of pixels; knows no image, model or HTTP.

Shapes: D objects of one image, M x M the mask head's output size. A node is one bound of one run: a horizontal pixel
edge from (x, y) to (x + 1, y), with the mask below it (a start, even index in `ys`) or above it (an end, odd index).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np

from service.jit import compiled
from service.masks._runs import ColumnRuns, Int32Array, find_runs
from service.structures import Float32Array, Int64Array, MaskStyle

# How far a simplified outline may lie from the edges of the pixels: enough to leave out the steps of a slope.
_TOLERANCE_PIXELS = 1.0


def encode_polygons(
    masks: Float32Array,
    boxes: Float32Array,
    image_size: tuple[int, int],
    threshold: float = 0.5,
    *,
    style: MaskStyle = "torchvision",
) -> list[list[Int64Array]]:
    """Outline the pixels of `paste_masks_in_image(masks, boxes, image_size) >= threshold`.

    Parts that share no pixel edge become separate polygons. A hole is joined to the outline around it by a vertical cut
    of zero width. Filling the polygons with `pycocotools` restores exactly the same pixels (IoU 1).

    Args:
        masks: (D, M, M) float32 probabilities, each spread over its box.
        boxes: (D, 4) float32, in pixels of the image; may reach outside.
        image_size: (height, width).
        threshold: above 0, at most 1.
        style: whose `paste_masks_in_image` to follow.

    Returns:
        Each object's polygons, none if it has no pixels; each is [x1, y1, x2, y2, …] with at least four corners,
        clockwise, in whole pixels: pixel (row, column) covers [column, column + 1] x [row, row + 1].

    Raises:
        ValueError: other shapes, or a box that is not finite.
    """
    runs = find_runs(masks, boxes, image_size, threshold, style=style)
    return _trace(runs, with_holes=True)


def encode_outlines(
    masks: Float32Array,
    boxes: Float32Array,
    image_size: tuple[int, int],
    *,
    style: MaskStyle = "torchvision",
) -> list[list[list[int]]]:
    """Outline each mask with few corners, for people to edit: slopes have no steps, and holes are filled. The
    threshold is 0.5; arguments and errors are as in `encode_polygons`.

    Returns:
        Each object's outlines, the largest first, none if it has no pixels; each is [x1, y1, x2, y2, …] with at least
        three corners, in whole pixels, at most a pixel away from the edges of the mask's pixels.
    """
    objects = _trace(find_runs(masks, boxes, image_size, style=style), with_holes=False)
    return [sorted(map(_simplified, outlines), key=polygon_area, reverse=True) for outlines in objects]


def _simplified(outline: Int64Array) -> list[int]:
    corners = outline.astype(np.int32).reshape(-1, 2)
    fewer = cv2.approxPolyDP(corners, _TOLERANCE_PIXELS, closed=True).astype(np.int32, copy=False)
    found: list[int] = (fewer if len(fewer) >= 3 else corners).ravel().tolist()
    return found


def _trace(runs: ColumnRuns, *, with_holes: bool) -> list[list[Int64Array]]:
    """The corners of each object's polygons, x and y by turns."""
    corners, ends, parts = _trace_objects(runs.first_x, runs.first_column, runs.first_y, runs.ys, with_holes)
    polygons = [corners[start:end] for start, end in pairwise([0, *ends.tolist()])]
    return [polygons[start:end] for start, end in pairwise([0, *parts.cumsum().tolist()])]


def polygon_area(polygon: Sequence[int] | Int64Array) -> float:
    """The number of pixels within a polygon [x1, y1, x2, y2, …] along their edges."""
    return cv2.contourArea(np.array(polygon, np.float32).reshape(-1, 2))


def outer_pixels(polygon: Sequence[int] | Int64Array) -> list[tuple[int, int]]:
    """The pixels at the corners of one of `encode_polygons`' polygons, just inside it: the convention of OpenCV's
    `findContours`, for programs that fill polygons with `cv2.fillPoly`, which paints the outline, too.

    Returns:
        (column, row) of each corner, in the same order.
    """
    corners = np.asarray(polygon, np.int64).reshape(-1, 2, 2)
    # Each pair of corners ends a vertical edge, and a horizontal one leads to the next. Clockwise, the mask is to the
    # left of an edge that goes down, and above one that goes left.
    xs, (start, end) = corners[:, 0, 0], corners[:, :, 1].T
    goes_down, goes_left = end > start, np.roll(xs, -1) < xs
    columns, rows = xs - goes_down, end - goes_left
    pairs = zip(columns.tolist(), np.roll(rows, 1).tolist(), rows.tolist(), strict=True)
    return [corner for x, first, last in pairs for corner in ((x, first), (x, last))]


@compiled()
def _trace_objects(
    first_x: Int64Array, first_column: Int64Array, first_y: Int64Array, ys: Int32Array, with_holes: bool
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """The corners of all polygons concatenated, where each polygon's corners end, and how many polygons each object
    has. Holes are joined to the outline around them, or left out.
    """
    corners = np.empty(4 * len(ys), np.int64)
    ends = np.empty(len(ys) // 2, np.int64)
    parts = np.zeros(len(first_x), np.int64)
    number = length = 0
    for d in range(len(first_x)):
        columns = first_y[first_column[d] : first_column[d + 1] + 1]
        own = ys[columns[0] : columns[-1]]
        xs, left, right = _link(own, columns - columns[0])
        if with_holes:
            _open_holes(columns - columns[0], xs, left, right)
        visited = np.zeros(len(own), np.bool_)
        for first in range(len(own)):
            if visited[first]:
                continue
            node = first
            begin = length
            while not visited[node]:
                visited[node] = True
                neighbor, x = (left[node], xs[node]) if node & 1 else (right[node], xs[node] + 1)
                if own[neighbor] != own[node]:  # Otherwise the edge continues straight.
                    corners[length], corners[length + 1] = first_x[d] + x, own[node]
                    corners[length + 2], corners[length + 3] = first_x[d] + x, own[neighbor]
                    length += 4
                node = neighbor
            if first & 1:  # The mask is above the topmost edge of the leftmost column: this outline is a hole.
                length = begin
                continue
            ends[number] = length
            number += 1
            parts[d] += 1
    return corners[:length], ends[:number], parts


@compiled()
def _link(ys: Int32Array, columns: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Each node's column, and the nodes that the outline reaches from its left end and from its right end.

    Where two columns meet, their sorted bounds pair up: between the first and the second the mask is on only one side
    of the line, so there is a vertical edge; between the second and the third it is on both sides or on neither.
    """
    xs, left, right = np.empty(len(ys), np.int64), np.empty(len(ys), np.int64), np.empty(len(ys), np.int64)
    a = 0
    for x in range(len(columns)):
        b, middle = columns[x], columns[x]
        after = columns[x + 1] if x + 1 < len(columns) else middle
        waiting = -1
        while a < middle or b < after:
            # Among equal bounds an end comes first, so that pixels that touch only at a corner are not joined.
            if b == after or (a < middle and (ys[a] < ys[b] or (ys[a] == ys[b] and a & 1))):
                node = a
                a += 1
            else:
                node = b
                xs[b] = x
                b += 1
            if waiting < 0:
                waiting = node
            else:
                # `_connect` without a call, which would count references to the arrays, by atomic operations.
                if waiting < middle:
                    right[waiting] = node
                else:
                    left[waiting] = node
                if node < middle:
                    right[node] = waiting
                else:
                    left[node] = waiting
                waiting = -1
    return xs, left, right


@compiled()
def _open_holes(columns: Int64Array, xs: Int64Array, left: Int64Array, right: Int64Array) -> None:
    """Join each hole's outline to the surrounding one, or to another hole's, by a cut along a line between columns."""
    visited = np.zeros(len(xs), np.bool_)
    for first in range(len(xs)):
        if visited[first]:
            continue
        node = first
        while not visited[node]:
            visited[node] = True
            node = left[node] if node & 1 else right[node]
        if first & 1:  # A hole, see above.
            above, middle = first - 1, columns[xs[first]]
            _connect(left[above], left[first], middle, left, right)
            _connect(above, first, middle, left, right)


@compiled()
def _connect(one: int, other: int, middle: int, left: Int64Array, right: Int64Array) -> None:
    """Join two nodes at a line between columns: nodes before `middle` end at it, the others begin there."""
    (right if one < middle else left)[one] = other
    (right if other < middle else left)[other] = one
