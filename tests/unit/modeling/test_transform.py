from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from service.modeling.config import TransformConfig
from service.modeling.transform import Transform

CONFIG = TransformConfig(min_size=80, max_size=133)
SEVERAL = [(40, 60), (301, 103), (80, 80), (1, 1)]


@given(st.integers(1, 400), st.integers(1, 400))
def test_sizes_are_those_that_torchvision_arrives_at(height: int, width: int) -> None:
    theirs = GeneralizedRCNNTransform(CONFIG.min_size, CONFIG.max_size, list(CONFIG.mean), list(CONFIG.std)).eval()
    ours = Transform(CONFIG)
    if 133 * min(height, width) < max(height, width):
        return  # torchvision cannot resize it: a side would be nothing
    batch, _ = theirs([torch.zeros(3, height, width)])
    assert ours.resized_size((height, width)) == tuple(batch.image_sizes[0])
    assert ours.padded_size((height, width)) == tuple(batch.tensors.shape[-2:])


def test_a_batch_holds_the_normalised_pixels_padded_with_zeros() -> None:
    grey = torch.full((40, 60, 3), 255, dtype=torch.uint8)  # 40 -> 80, 60 -> 120; padded to 96 x 128
    batch = Transform(CONFIG).eval().prepare([grey])
    assert batch.tensors.shape == (1, 3, 96, 128)
    assert batch.image_sizes == [(80, 120)]
    red = (1 - CONFIG.mean[0]) / CONFIG.std[0]
    assert batch.tensors[0, 0, :80, :120].min().item() == pytest.approx(red, abs=1e-5)
    assert batch.tensors[0, :, 80:].abs().max().item() == 0
    assert batch.tensors[0, :, :, 120:].abs().max().item() == 0


@pytest.mark.parametrize("size", [(40, 60), (61, 47), (480, 640), (301, 1003), (1, 1)])
def test_pixels_are_those_of_torchvisions_transform(size: tuple[int, int]) -> None:
    """Ours takes bytes and does the rest on the device."""
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = GeneralizedRCNNTransform(CONFIG.min_size, CONFIG.max_size, list(CONFIG.mean), list(CONFIG.std)).eval()
    expected, _ = theirs([pixels.permute(2, 0, 1) / 255])
    batch = Transform(CONFIG).eval().prepare([pixels])
    assert batch.image_sizes == expected.image_sizes
    torch.testing.assert_close(batch.tensors, expected.tensors, rtol=0, atol=1e-3)


def test_a_batch_of_several_sizes_is_torchvisions() -> None:
    """One image wide, one high, one in need of neither: the batch is as large as the largest side of each kind."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator) for size in SEVERAL]
    theirs = GeneralizedRCNNTransform(CONFIG.min_size, CONFIG.max_size, list(CONFIG.mean), list(CONFIG.std)).eval()
    expected, _ = theirs([pixels.permute(2, 0, 1) / 255 for pixels in images])
    batch = Transform(CONFIG).eval().prepare(images)
    assert batch.image_sizes == expected.image_sizes
    torch.testing.assert_close(batch.tensors, expected.tensors, rtol=0, atol=1e-3)


def test_a_float_image_is_normalised_as_by_torchvision() -> None:
    """In training, and on CUDA."""
    theirs = GeneralizedRCNNTransform(CONFIG.min_size, CONFIG.max_size, list(CONFIG.mean), list(CONFIG.std))
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    ours = Transform(CONFIG)
    torch.testing.assert_close(ours.normalize(image), theirs.normalize(image), rtol=0, atol=0)
    assert not ours.state_dict()  # torchvision's weights have none of it
