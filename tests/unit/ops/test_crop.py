import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from service.ops import crop
from tests.unit.ops import reference
from tests.unit.ops.cases import DEVICES, GRID, Rois, any_rois, box, random_features, random_rois


def test_box_of_the_output_size_is_copied() -> None:
    #    0  1  2  3  4     Pixel 1 reaches from 1 to 2, so (1, 1) - (4, 4) is the pixels 1, 2 and 3.
    #    5 [6  7  8] 9
    #   10[11 12 13]14
    #   15[16 17 18]19
    assert crop(GRID, box(1, 1, 4, 4), 3, padding=0).tolist() == [[[[6, 7, 8], [11, 12, 13], [16, 17, 18]]]]


def test_padding_is_context_from_the_image_measured_after_warping() -> None:
    assert torch.equal(crop(GRID, box(1, 1, 4, 4), 5, padding=1), GRID)
    # A box of one pixel, twice enlarged: one output pixel of context is half an image pixel.
    assert crop(GRID, box(2, 2, 3, 3), 4, padding=1)[0, 0, 1].tolist() == [
        5 * 1.75 + x for x in (1.25, 1.75, 2.25, 2.75)
    ]


def test_box_is_warped_whatever_its_shape() -> None:
    # The upper row, five wide and one high, as one column of three: the middle of the row, above, at and below its own.
    assert crop(GRID + 30, box(0, 1, 5, 2), (3, 1), padding=0).flatten().tolist() == pytest.approx(
        [32 + 5 * (1 - 1 / 3), 32 + 5, 32 + 5 * (1 + 1 / 3)]
    )


def test_image_goes_on_as_zero() -> None:
    expected = torch.zeros(5, 5, dtype=torch.float64)
    expected[1:, 1:] = GRID[0, 0, :4, :4] + 1
    assert torch.equal(crop(GRID + 1, box(0, 0, 3, 3), 5, padding=1)[0, 0], expected)


@pytest.mark.parametrize("padding", [-1, 3, 16])
def test_padding_that_leaves_no_room_for_the_box_is_refused(padding: int) -> None:
    with pytest.raises(ValueError, match=rf"from 0 to less than half of \(7, 6\), got {padding}"):
        crop(GRID, box(0, 0, 1, 1), (7, 6), padding=padding)


@settings(deadline=None, max_examples=50)
@given(any_rois, st.tuples(st.integers(5, 7), st.integers(5, 7)), st.integers(0, 2))
def test_agrees_with_the_reference(rois: Rois, size: tuple[int, int], padding: int) -> None:
    images = random_features()
    expected = reference.crop(images.numpy(), rois, size, 0.25, padding)
    crops = crop(images, torch.from_numpy(rois), size, 0.25, padding)
    torch.testing.assert_close(crops, torch.from_numpy(expected))


@pytest.mark.parametrize("device", DEVICES)
def test_device_does_not_matter(device: str) -> None:
    images, rois = random_features(20, 18), random_rois(40, extent=20)
    torch.testing.assert_close(crop(images.to(device), rois.to(device), 40).cpu(), crop(images, rois, 40))


def test_gradcheck() -> None:
    rois = random_rois(3, extent=6)
    assert gradcheck(lambda images: crop(images, rois, (5, 6), padding=1), random_features(4, 5).requires_grad_())
