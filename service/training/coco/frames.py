"""Convert coordinates from a picture as stored to the upright picture that is shown, served and trained on.

Shapes: H x W the stored picture, P points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.structures import UInt8Array

# By EXIF orientation: swap rows and columns, then mirror left to right, then upside down.
_TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


@dataclass(frozen=True, slots=True)
class Frame:
    """What an annotation's coordinates refer to.

    Attributes:
        stored_size: (height, width) of the picture that was annotated.
        orientation: EXIF's, 1 to 8, still to be applied to the coordinates; 1 if they are upright already.
    """

    stored_size: tuple[int, int]
    orientation: int = 1

    @property
    def is_upright(self) -> bool:
        """Whether no rotation or mirroring is needed."""
        return self.orientation == 1

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) of the upright picture."""
        height, width = self.stored_size
        return (width, height) if _TURNS[self.orientation][0] else (height, width)

    def turned_points(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(P, 2) x, y in the stored picture -> x, y in the upright one."""
        swaps, mirrors_x, mirrors_y = _TURNS[self.orientation]
        height, width = self.upright_size
        x, y = (points[:, 1], points[:, 0]) if swaps else (points[:, 0], points[:, 1])
        return np.stack([width - x if mirrors_x else x, height - y if mirrors_y else y], axis=1)

    def turned_box(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) likewise."""
        corners = self.turned_points(np.array(box, dtype=np.float64).reshape(2, 2))
        (x1, y1), (x2, y2) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
        return x1, y1, x2, y2

    def turned_pixels(self, pixels: UInt8Array) -> UInt8Array:
        """(H, W) or (H, W, C) of the stored picture, upright."""
        swaps, mirrors_x, mirrors_y = _TURNS[self.orientation]
        turned = pixels.swapaxes(0, 1) if swaps else pixels
        return turned[:: -1 if mirrors_y else 1, :: -1 if mirrors_x else 1]
