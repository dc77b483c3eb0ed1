"""What the tests of the RoI operators share: the 5 x 5 grid, devices, and boxes of every kind."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]

# A value says where it stands: row y, column x holds 5 y + x, also between the cells.
#
#     0  1  2  3  4
#     5  6  7  8  9
#    10 11 12 13 14
#    15 16 17 18 19
#    20 21 22 23 24
GRID = torch.arange(25.0, dtype=torch.float64).reshape(1, 1, 5, 5)

# (K, 5) as (image index, x1, y1, x2, y2).
Rois = NDArray[np.float64]

NAN, INF = float("nan"), float("inf")


def box(x1: float, y1: float, x2: float, y2: float) -> list[Tensor]:
    """One box of one image."""
    return [torch.tensor([[x1, y1, x2, y2]], dtype=torch.float64)]


def random_features(height: int = 6, width: int = 7, seed: int = 0) -> Tensor:
    """(2, 3, height, width) float64, no two values alike."""
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_rois(count: int, *, extent: float, seed: int = 0) -> Tensor:
    """(count, 5) float64 over two images, corners in order, up to an eighth of `extent` outside [0, extent]."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, dtype=torch.float64, generator=generator).sort(dim=1).values
    indices = torch.randint(2, (count, 1), generator=generator)
    return torch.cat([indices, corners.flatten(1) * extent * 1.25 - extent / 8], dim=1)


def _roi(values: tuple[int, int, int, int, int]) -> list[float]:
    index, x1, y1, x2, y2 = values
    # Eighths, and a little that keeps corners, sides and points off every place where an operator jumps (the ends of
    # the map, ties of rounding): there float64 in another order may rightly end up on the other side.
    return [index, x1 / 8 + 0.013, y1 / 8 + 0.013, x2 / 8 + 0.029, y2 / 8 + 0.029]


# Boxes inside, outside, across the border of a 24 x 28 image (a 6 x 7 map of stride 4), thin, and inside out.
_eighths = st.integers(-160, 400)
any_rois: st.SearchStrategy[Rois] = st.lists(
    st.tuples(st.integers(0, 1), _eighths, _eighths, _eighths, _eighths).map(_roi), max_size=3
).map(lambda rois: np.array(rois, dtype=np.float64).reshape(-1, 5))
any_size = st.tuples(st.integers(1, 3), st.integers(1, 3))
