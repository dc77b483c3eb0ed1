import pytest
import torch
import torchvision
from hypothesis import given, settings
from torch.autograd import gradcheck

from service.ops import roi_pool
from tests.unit.ops import reference
from tests.unit.ops.cases import DEVICES, GRID, Rois, any_rois, any_size, box, random_features, random_rois


def test_corners_are_rounded_the_last_cell_belongs_to_the_box_and_bins_overlap() -> None:
    #    0  1  2  3  4     (1.4, 0.6) - (2.6, 3.4) becomes the cells 1..3 both ways, three for two bins:
    #    5 [6  7  8] 9     bin 0 is floor(0) .. ceil(1.5), bin 1 is floor(1.5) .. ceil(3), so both hold the middle one.
    #   10[11 12 13]14
    #   15[16 17 18]19
    #   20 21 22 23 24
    assert roi_pool(GRID, box(1.4, 0.6, 2.6, 3.4), 2).tolist() == [[[[12, 13], [17, 18]]]]


def test_half_a_cell_is_rounded_away_from_zero() -> None:
    assert roi_pool(GRID, box(0.5, 0.5, 0.5, 0.5), 1).item() == 6
    assert roi_pool(GRID, box(-0.5, -0.5, -0.5, -0.5), 1).item() == 0
    assert roi_pool(-GRID - 1, box(2.5, 2.5, 2.5, 2.5), 1).item() == -19


def test_spatial_scale_turns_image_pixels_into_cells() -> None:
    assert roi_pool(GRID, box(16, 16, 48, 48), 1, spatial_scale=1 / 16).item() == 18


def test_bins_outside_the_map_are_zero_even_where_features_are_negative() -> None:
    # Columns 3..6, of which 5 and 6 do not exist; the second bin has nothing but those.
    assert roi_pool(GRID - 100, box(3, 0, 6, 0), (1, 2)).tolist() == [[[[-96, 0]]]]


def test_gradient_goes_to_the_largest_cell_and_adds_up_over_boxes_that_share_it() -> None:
    features = GRID.clone().requires_grad_()
    twice = torch.tensor([[0, 0, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4]])
    roi_pool(features, [twice], 1).sum().backward()
    expected = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    expected[0, 0, 2, 2] = 2
    expected[0, 0, 4, 4] = 1
    assert features.grad is not None
    assert torch.equal(features.grad, expected)


@settings(deadline=None, max_examples=50)
@given(any_rois, any_size)
def test_agrees_with_the_reference(rois: Rois, size: tuple[int, int]) -> None:
    features = random_features()
    expected = reference.roi_pool(features.numpy(), rois, size, 0.25)
    torch.testing.assert_close(roi_pool(features, torch.from_numpy(rois), size, 0.25), torch.from_numpy(expected))


@pytest.mark.parametrize("device", DEVICES)
def test_values_and_gradients_are_those_of_torchvision(device: str) -> None:
    rois = random_rois(40, extent=80).to(device)
    ours, theirs = (random_features(20, 18).to(device).requires_grad_() for _ in range(2))
    pooled, expected = roi_pool(ours, rois, (7, 5), 0.25), torchvision.ops.roi_pool(theirs, rois, (7, 5), 0.25)
    assert torch.equal(pooled, expected)
    weights = torch.randn_like(pooled)
    (pooled * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradcheck() -> None:
    rois = random_rois(3, extent=20)
    assert gradcheck(lambda features: roi_pool(features, rois, (3, 2), 0.25), random_features(4, 5).requires_grad_())
