from __future__ import annotations

import numpy as np
import PIL.Image
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


DETECTRON2 = TransformConfig(style="detectron2", min_size=80, max_size=133)


@pytest.mark.parametrize("size", [(40, 60), (301, 203), (80, 80), (61, 747)])
def test_in_detectron2s_style_training_and_cuda_see_the_pixels_that_the_cpu_serves(size: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = Transform(DETECTRON2)
    served = ours.eval().prepare([pixels])
    trained, _ = ours.train()([pixels.permute(2, 0, 1) / 255], [{"boxes": torch.zeros(0, 4)}])
    assert served.image_sizes == [ours.resized_size(size)] == trained.image_sizes
    torch.testing.assert_close(trained.tensors, served.tensors, rtol=0, atol=1e-6)


def test_in_detectron2s_style_grey_is_resized_as_pillow_resizes_grey() -> None:
    pixels = torch.randint(0, 256, (50, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = DETECTRON2.model_copy(update={"channels": "grey", "mean": (0.0,), "std": (1.0,)})
    batch = Transform(config).eval().prepare([pixels])
    grey = PIL.Image.fromarray(pixels.numpy()).convert("L").resize((80, 100), PIL.Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(grey)) / 255
    torch.testing.assert_close(batch.tensors[0, 0, :100, :80], expected, rtol=0, atol=1e-6)


def test_in_detectron2s_style_boxes_and_masks_of_training_follow_the_picture() -> None:
    masks = torch.zeros(1, 40, 60, dtype=torch.uint8)
    masks[0, 10:20, 30:60] = 1
    target = {"boxes": torch.tensor([[30.0, 10, 60, 20]]), "masks": masks}
    _, [resized] = Transform(DETECTRON2).train()([torch.zeros(3, 40, 60)], [target])
    assert resized["boxes"].tolist() == [[60, 20, 120, 40]]
    assert resized["masks"].shape == (1, 80, 120)
    assert resized["masks"].sum() == resized["masks"][0, 20:40, 60:120].sum() == 20 * 60


@pytest.mark.parametrize(("multiple", "padded"), [(1, (80, 107)), (32, (96, 128)), (128, (128, 128))])
def test_batches_are_padded_to_the_multiple_of_the_configuration(multiple: int, padded: tuple[int, int]) -> None:
    ours = Transform(DETECTRON2.model_copy(update={"size_divisible": multiple})).eval()
    assert ours.padded_size((60, 80)) == padded
    assert ours.prepare([torch.zeros(60, 80, 3, dtype=torch.uint8)]).tensors.shape[-2:] == padded
