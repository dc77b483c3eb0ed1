"""Masks as runs of pixels in each image row, made from the runs in columns: for formats that go row by row. The cost is
proportional to the mask's outline, not its area.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from service.jit import compiled
from service.masks._runs import ColumnRuns, Int32Array
from service.structures import Int64Array


@dataclass(frozen=True, slots=True, eq=False)
class RowRuns:
    """One binary mask, as runs in rows.

    Attributes:
        first_y: image row of the first row.
        rows: (rows + 1,) row r owns the bounds `xs[rows[r]:rows[r + 1]]`.
        xs: start, end, start, end, ... of the runs, rising within a row, in columns of the image.
    """

    first_y: int
    rows: Int64Array
    xs: Int32Array


def row_runs(runs: ColumnRuns, index: int) -> RowRuns:
    """The mask of one object; without rows if it is empty.

    Args:
        runs: of all objects.
        index: of the object.
    """
    columns, ys = runs.of(index)
    first_y, last_y = (int(ys.min()), int(ys.max())) if len(ys) else (0, 0)
    rows, xs = _transpose(columns, ys, int(runs.first_x[index]), first_y, last_y)
    return RowRuns(first_y, rows, xs)


@compiled()
def _transpose(
    columns: Int64Array, ys: Int32Array, first_x: int, first_y: int, last_y: int
) -> tuple[Int64Array, Int32Array]:
    """Collect the vertical pixel edges by row. Columns are visited from left to right, so within a row they come in
    order, alternately the start and the end of a run.

    Where two columns meet, their sorted bounds pair up: between the first and the second the mask is on only one side
    of the line, so there is an edge; between the second and the third it is on both sides or on neither.
    """
    rows = np.zeros(last_y - first_y + 1, np.int64)
    following, xs = rows, np.empty(0, np.int32)
    for is_counting in (True, False):
        if not is_counting:
            rows = rows.cumsum()
            following, xs = rows.copy(), np.empty(rows[-1], np.int32)
        a = 0
        for x in range(len(columns)):
            b = middle = columns[x]
            after = columns[x + 1] if x + 1 < len(columns) else middle
            start = -1
            while a < middle or b < after:
                if b == after or (a < middle and ys[a] < ys[b]):
                    y = ys[a] - first_y
                    a += 1
                else:
                    y = ys[b] - first_y
                    b += 1
                if start < 0:
                    start = y
                    continue
                for row in range(start, y):
                    if is_counting:
                        rows[row + 1] += 1
                    else:
                        xs[following[row]] = first_x + x
                        following[row] += 1
                start = -1
    return rows, xs
