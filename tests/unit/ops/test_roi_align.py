import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from service.ops import roi_align
from tests.unit.ops import reference
from tests.unit.ops.cases import DEVICES, GRID, Rois, any_rois, any_size, box, random_features, random_rois

# 1 at the middle of the 5 x 5 grid: what comes out is the weight of that cell.
PEAK = (GRID == 12).double()


def test_reads_the_middle_of_each_bin_between_the_cells() -> None:
    #    0  1  2  3  4     The bins of (1, 1) - (3, 3) are one cell wide, with their middles at 1.5 and 2.5;
    #    5  6  7  8  9     the first reads (6 + 7 + 11 + 12) / 4 = 9.
    #   10 11 12 13 14
    #   15 16 17 18 19
    assert roi_align(GRID, box(1, 1, 3, 3), 2, sampling_ratio=1).tolist() == [[[[9, 10], [14, 15]]]]


def test_aligned_box_of_whole_cells_is_copied() -> None:
    assert roi_align(GRID, box(1, 1, 3, 3), 2, sampling_ratio=1, aligned=True).tolist() == [[[[6, 7], [11, 12]]]]


def test_nothing_is_rounded() -> None:
    # 1.3 and 2.2 cells to the right and down add 1.3 + 5 * 2.2 to every value.
    moved = roi_align(GRID, box(1.3, 2.2, 2.3, 3.2), 1, sampling_ratio=2).item()
    assert moved == pytest.approx(roi_align(GRID, box(0, 0, 1, 1), 1, sampling_ratio=2).item() + 12.3)


@pytest.mark.parametrize(
    ("sampling_ratio", "weight"),
    [
        (1, 1.0),  # one point, on the peak
        (2, 0.0),  # points at 1 and 3, a cell away from it
        (0, 1 / 16),  # 4 x 4 points, of which the four at 1.5 and 2.5 see a quarter of it each
        (-1, 1 / 16),  # what torchvision writes for the same
    ],
)
def test_sampling_ratio_is_the_number_of_points_a_side(sampling_ratio: int, weight: float) -> None:
    assert roi_align(PEAK, box(0, 0, 4, 4), 1, sampling_ratio=sampling_ratio).item() == weight


def test_unaligned_box_is_at_least_one_cell_wide() -> None:
    # An empty box at (1, 1) becomes the cell to (2, 2), whose middle is read: 5 * 1.5 + 1.5.
    assert roi_align(GRID, box(1, 1, 1, 1), 1, sampling_ratio=1).item() == 9
    assert roi_align(GRID, box(1.5, 1.5, 1.5, 1.5), 1, sampling_ratio=1, aligned=True).item() == 6


def test_border_is_repeated_for_one_cell_and_then_there_is_nothing() -> None:
    ones = torch.ones_like(GRID)
    points = [roi_align(ones, box(x, 1, x + 1, 2), 1, sampling_ratio=1).item() for x in (-1.75, -1.5, 4.5, 4.75)]
    assert points == [0, 1, 1, 0]


def test_gradient_is_spread_over_the_four_cells_around_a_point() -> None:
    features = GRID.clone().requires_grad_()
    roi_align(features, box(1.25, 1, 2.25, 2), 1, sampling_ratio=1).backward()
    assert features.grad is not None
    assert features.grad[0, 0, 1:3, 1:3].tolist() == [[0.125, 0.375], [0.125, 0.375]]
    assert features.grad.sum() == 1


@settings(deadline=None, max_examples=50)
@given(any_rois, any_size, st.integers(0, 3), st.booleans())
def test_agrees_with_the_reference(rois: Rois, size: tuple[int, int], sampling_ratio: int, aligned: bool) -> None:
    features = random_features()
    expected = reference.roi_align(features.numpy(), rois, size, 0.25, sampling_ratio, aligned)
    pooled = roi_align(features, torch.from_numpy(rois), size, 0.25, sampling_ratio, aligned)
    torch.testing.assert_close(pooled, torch.from_numpy(expected))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
def test_values_and_gradients_are_those_of_torchvision(device: str, aligned: bool, sampling_ratio: int) -> None:
    rois = random_rois(40, extent=80).to(device)
    ours, theirs = (random_features(20, 18).to(device).requires_grad_() for _ in range(2))
    pooled = roi_align(ours, rois, (7, 5), 0.25, sampling_ratio, aligned)
    expected = torchvision.ops.roi_align(theirs, rois, (7, 5), 0.25, sampling_ratio, aligned)
    torch.testing.assert_close(pooled, expected)
    weights = torch.randn_like(pooled)
    (pooled * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_gradcheck(sampling_ratio: int, aligned: bool) -> None:
    rois = random_rois(3, extent=20)
    features = random_features(4, 5).requires_grad_()
    assert gradcheck(lambda features: roi_align(features, rois, (3, 2), 0.25, sampling_ratio, aligned), features)
