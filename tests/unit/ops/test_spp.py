import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from service.ops import roi_pool, spp
from tests.unit.ops import reference
from tests.unit.ops.cases import DEVICES, GRID, Rois, any_rois, box, random_features, random_rois


def test_grids_of_maxima_follow_each_other_row_by_row() -> None:
    #    5 [6  7  8] 9     The 2 x 2 grid of the cells 1..3 has bins that share the middle one; the 1 x 1 grid is all.
    #   10[11 12 13]14
    #   15[16 17 18]19
    assert spp(GRID, box(1, 1, 3, 3), (2, 1)).flatten().tolist() == [12, 13, 17, 18, 18]


def test_head_is_sized_to_the_bins_of_all_grids() -> None:
    assert spp(random_features(), random_rois(5, extent=6), (4, 2, 1)).shape == (5, 3, 4 * 4 + 2 * 2 + 1, 1)


def test_pyramid_of_one_level_is_roi_pool() -> None:
    features, rois = random_features(), random_rois(8, extent=24)
    expected = roi_pool(features, rois, 3, 0.25).flatten(2).unsqueeze(3)
    assert torch.equal(spp(features, rois, 3, 0.25), expected)
    assert torch.equal(spp(features, rois, [3], 0.25), expected)


def test_gradient_of_a_cell_adds_up_over_the_grids() -> None:
    features = GRID.clone().requires_grad_()
    spp(features, box(1, 1, 3, 3), (2, 1)).sum().backward()
    assert features.grad is not None
    # 18 is the largest of the last quarter and of the whole.
    assert features.grad[0, 0, 1:4, 1:4].tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 2]]


@settings(deadline=None, max_examples=50)
@given(any_rois, st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_agrees_with_the_reference(rois: Rois, grids: list[int]) -> None:
    features = random_features()
    expected = reference.spp(features.numpy(), rois, grids, 0.25)
    torch.testing.assert_close(spp(features, torch.from_numpy(rois), grids, 0.25), torch.from_numpy(expected))


@pytest.mark.parametrize("device", DEVICES)
def test_device_does_not_matter(device: str) -> None:
    features, rois = random_features(20, 18), random_rois(40, extent=80)
    pooled = spp(features.to(device), rois.to(device), (4, 2, 1), 0.25)
    assert torch.equal(pooled.cpu(), spp(features, rois, (4, 2, 1), 0.25))


def test_gradcheck() -> None:
    rois = random_rois(3, extent=20)
    assert gradcheck(lambda features: spp(features, rois, (2, 1), 0.25), random_features(4, 5).requires_grad_())
