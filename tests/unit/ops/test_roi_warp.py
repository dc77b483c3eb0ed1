import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from service.ops import roi_align, roi_warp
from tests.unit.ops import reference
from tests.unit.ops.cases import DEVICES, GRID, Rois, any_rois, box, random_features, random_rois


def test_box_is_rounded_once_and_then_read_between_the_cells() -> None:
    # (1.4, 0.6) - (3.4, 2.6) becomes (1, 1) - (3, 3), whose quarters have their middles at 1.5 and 2.5.
    assert roi_warp(GRID, box(1.4, 0.6, 3.4, 2.6), 2).tolist() == [[[[9, 10], [14, 15]]]]
    assert roi_warp(GRID, box(1.4, 0.6, 3.4, 2.6), 2, aligned=True).tolist() == [[[[6, 7], [11, 12]]]]


def test_bins_are_not_rounded() -> None:
    # Three cells for two elements: middles at 1 + 0.75 and 1 + 2.25, so columns differ by 1.5 and rows by 5 * 1.5.
    assert roi_warp(GRID, box(1, 1, 4, 4), 2).tolist() == [[[[10.5, 12], [18, 19.5]]]]


def test_half_a_cell_is_rounded_away_from_zero() -> None:
    assert torch.equal(roi_warp(GRID, box(0.5, 0.5, 2.5, 2.5), 2), roi_warp(GRID, box(1, 1, 3, 3), 2))
    assert torch.equal(roi_warp(GRID, box(-0.5, -0.5, 1.5, 1.5), 2), roi_warp(GRID, box(-1, -1, 2, 2), 2))


def test_moving_a_box_within_its_rounding_changes_nothing_while_roi_align_follows() -> None:
    here, there = box(1, 1, 3, 3), box(1.4, 1.4, 3.4, 3.4)
    assert torch.equal(roi_warp(GRID, here, 2), roi_warp(GRID, there, 2))
    moved = roi_align(GRID, there, 2, sampling_ratio=1) - roi_align(GRID, here, 2, sampling_ratio=1)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.4 + 5 * 0.4))


@pytest.mark.parametrize("sampling_ratio", [0, -1])
def test_adaptive_sampling_is_refused(sampling_ratio: int) -> None:
    with pytest.raises(ValueError, match="sampling_ratio of 1 or more"):
        roi_warp(GRID, box(0, 0, 1, 1), 1, sampling_ratio=sampling_ratio)


# Rounded boxes end on the map's ends, where a point reads the border or nothing: only halves keep both sides exact.
halves = st.sampled_from([1, 2, 4])


@settings(deadline=None, max_examples=50)
@given(any_rois, st.tuples(halves, halves), halves, st.booleans())
def test_agrees_with_the_reference(rois: Rois, size: tuple[int, int], sampling_ratio: int, aligned: bool) -> None:
    features = random_features()
    expected = reference.roi_warp(features.numpy(), rois, size, 0.25, sampling_ratio, aligned)
    pooled = roi_warp(features, torch.from_numpy(rois), size, 0.25, sampling_ratio, aligned)
    torch.testing.assert_close(pooled, torch.from_numpy(expected))


@pytest.mark.parametrize("device", DEVICES)
def test_device_does_not_matter(device: str) -> None:
    features, rois = random_features(20, 18), random_rois(40, extent=80)
    pooled = roi_warp(features.to(device), rois.to(device), (7, 5), 0.25)
    torch.testing.assert_close(pooled.cpu(), roi_warp(features, rois, (7, 5), 0.25))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [1, 2])
def test_gradcheck(sampling_ratio: int, aligned: bool) -> None:
    rois = random_rois(3, extent=20)
    features = random_features(4, 5).requires_grad_()
    assert gradcheck(lambda features: roi_warp(features, rois, (3, 2), 0.25, sampling_ratio, aligned), features)
