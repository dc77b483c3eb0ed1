"""Resizing, normalising and padding in one pass: the pixels of torch's own steps one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from service.ops._cpu_kernels import multi_scale_roi_pool_channels_last
from service.ops.resize import resize_normalise_and_pad

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

sides = st.integers(1, 70)


def noise(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


def step_by_step(image: Tensor, size: tuple[int, int], padded_size: tuple[int, int]) -> Tensor:
    """(3, H', W')."""
    normalised = (image.permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    resized = functional.interpolate(normalised[None], size, mode="bilinear", align_corners=False)[0]
    return functional.pad(resized, (0, padded_size[1] - size[1], 0, padded_size[0] - size[0]))


def check(images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], padded_size: tuple[int, int]) -> None:
    batch = resize_normalise_and_pad(images, sizes, padded_size, mean=MEAN, std=STD)
    assert batch.is_contiguous()
    expected = [step_by_step(image, size, padded_size) for image, size in zip(images, sizes, strict=True)]
    torch.testing.assert_close(batch, torch.stack(expected), rtol=0, atol=1e-5)


@settings(deadline=None)
@given(sides, sides, sides, sides)
def test_pixels_are_those_of_torchs_own_steps(height: int, width: int, new_height: int, new_width: int) -> None:
    check([noise(height, width)], [(new_height, new_width)], (96, 96))


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((1, 1), (800, 800)),
        ((1, 3000), (1, 1333)),
        ((3000, 1), (1333, 1)),
        ((301, 1003), (400, 1333)),
        ((2, 2), (2, 2)),
    ],
)
def test_very_long_and_very_small_images_lose_no_precision(size: tuple[int, int], resized: tuple[int, int]) -> None:
    """On a side of 1000 pixels the last bit of a position is worth 1e-4 of what a whole pixel is."""
    check([noise(*size)], [resized], resized)


def test_images_of_a_batch_lie_each_in_its_own_corner_with_zeros_around() -> None:
    check([noise(40, 60), noise(61, 47), noise(1, 1)], [(40, 60), (96, 80), (7, 7)], (96, 128))


def test_a_view_of_a_larger_image_will_do() -> None:
    image = noise(90, 90)
    check([image[5:80:2, 3:70], image.transpose(0, 1), image.flip(2)], [(64, 50), (30, 31), (90, 90)], (96, 96))


def test_resizing_and_pooling_at_once_take_turns() -> None:
    """As two models' threads do; numba would end the process if they were in its parallel loops together."""
    image, feature, rois = noise(60, 80), torch.ones(1, 4, 50, 60), torch.tensor([[0.0, 0, 0, 40, 40]] * 50)

    def pool(_: int) -> Tensor:
        levels = torch.zeros(len(rois), dtype=torch.int64)
        return multi_scale_roi_pool_channels_last([feature], rois, levels, [1.0], (7, 7))

    with ThreadPoolExecutor(4) as threads:
        pooled = threads.map(pool, range(40))
        for _ in threads.map(lambda _: check([image], [(96, 128)], (96, 128)), range(40)):
            pass
        assert all(bool((one == 1).all()) for one in pooled)
