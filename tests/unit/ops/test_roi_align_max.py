import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from service.ops import roi_align, roi_align_max
from tests.unit.ops import reference
from tests.unit.ops.cases import DEVICES, GRID, Rois, any_rois, any_size, box, random_features, random_rois


def test_takes_the_largest_of_the_points_in_a_bin() -> None:
    # Bins of (1, 1) - (3, 3) have points at 1.25, 1.75 and 2.25, 2.75: the largest of the first is 6 * 1.75 = 10.5.
    assert roi_align_max(GRID, box(1, 1, 3, 3), 2, sampling_ratio=2).tolist() == [[[[10.5, 11.5], [15.5, 16.5]]]]


def test_adaptive_sampling_has_one_point_a_cell() -> None:
    # Four points across, two down; the last is at x = 3.5, y = 1.5: 5 * 1.5 + 3.5. Two by two would end at 3, 1.5.
    assert roi_align_max(GRID, box(0, 0, 4, 2), 1).item() == 11
    assert roi_align_max(GRID, box(0, 0, 4, 2), 1, sampling_ratio=2).item() == 10.5


def test_one_point_a_bin_leaves_nothing_to_choose() -> None:
    features, rois = random_features(), random_rois(8, extent=24)
    for aligned in (False, True):
        expected = roi_align(features, rois, (3, 2), 0.25, 1, aligned)
        assert torch.equal(roi_align_max(features, rois, (3, 2), 0.25, 1, aligned), expected)


def test_empty_box_has_no_points_unless_it_counts_as_one_cell() -> None:
    assert roi_align_max(GRID, box(2, 1, 2, 3), 2, aligned=True).tolist() == [[[[0, 0], [0, 0]]]]
    # From (2, 1) to (3, 3), a point a bin: x = 2.25 or 2.75, y = 1.5 or 2.5.
    assert roi_align_max(GRID, box(2, 1, 2, 3), 2).tolist() == [[[[9.75, 10.25], [14.75, 15.25]]]]


def test_gradient_goes_to_the_cells_around_the_largest_point_alone() -> None:
    features = GRID.clone().requires_grad_()
    roi_align_max(features, box(1, 1, 2, 2), 1, sampling_ratio=2).backward()
    assert features.grad is not None
    assert features.grad[0, 0, 1:3, 1:3].tolist() == [[0.0625, 0.1875], [0.1875, 0.5625]]
    assert features.grad.sum() == 1


@settings(deadline=None, max_examples=50)
@given(any_rois, any_size, st.integers(0, 3), st.booleans())
def test_agrees_with_the_reference(rois: Rois, size: tuple[int, int], sampling_ratio: int, aligned: bool) -> None:
    features = random_features()
    expected = reference.roi_align_max(features.numpy(), rois, size, 0.25, sampling_ratio, aligned)
    pooled = roi_align_max(features, torch.from_numpy(rois), size, 0.25, sampling_ratio, aligned)
    torch.testing.assert_close(pooled, torch.from_numpy(expected))


def test_points_are_held_in_memory_for_a_few_boxes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    features, rois = random_features(), random_rois(8, extent=24)
    at_once = [roi_align_max(features, rois, 2, 0.25, sampling_ratio) for sampling_ratio in (0, 2)]
    # 4 x 4 points in 3 channels for a box; the adaptive ones are fewer or more.
    monkeypatch.setattr(importlib.import_module("service.ops.roi_align_max"), "_MAX_VALUES_AT_ONCE", 3 * 4 * 4 * 3)
    for sampling_ratio, expected in zip((0, 2), at_once, strict=True):
        assert torch.equal(roi_align_max(features, rois, 2, 0.25, sampling_ratio), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_device_does_not_matter(device: str) -> None:
    features, rois = random_features(20, 18), random_rois(40, extent=80)
    pooled = roi_align_max(features.to(device), rois.to(device), (7, 5), 0.25)
    torch.testing.assert_close(pooled.cpu(), roi_align_max(features, rois, (7, 5), 0.25))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_gradcheck(sampling_ratio: int, aligned: bool) -> None:
    rois = random_rois(3, extent=20)
    features = random_features(4, 5).requires_grad_()
    assert gradcheck(lambda features: roi_align_max(features, rois, (3, 2), 0.25, sampling_ratio, aligned), features)
