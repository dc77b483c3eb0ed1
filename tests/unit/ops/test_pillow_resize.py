"""Resizing as Pillow does, to the last bit: both ways of doing it are held to Pillow itself."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.ops.pillow_resize import pillow_resize_normalise_and_pad, resize_bytes

sides = st.integers(1, 120)


def noise(height: int, width: int, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    picture = torch.randint(0, 256, (height, width, channels), dtype=torch.uint8, generator=generator)
    # Black and white are at the ends of the scale, where a sum of weights a little above 1 would show.
    picture[height // 2 :, : width // 2] = 255
    return picture


def by_pillow(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(h, w, C): first the width, then the height, as every Pillow before 13 does by itself."""
    height, width = size
    planes = [PIL.Image.fromarray(plane) for plane in image.permute(2, 0, 1).numpy()]
    resized = [
        plane.resize((width, plane.height), PIL.Image.Resampling.BILINEAR).resize(
            (width, height), PIL.Image.Resampling.BILINEAR
        )
        for plane in planes
    ]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in resized], axis=2))


def check(image: Tensor, size: tuple[int, int]) -> None:
    expected = by_pillow(image, size)
    assert torch.equal(resize_bytes(image, size), expected)
    height, width = size
    padded = (height + 3, width + 2)
    batch = pillow_resize_normalise_and_pad([image], [size], padded, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 1 / 255))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.1, 0.2, 1 / 255])
    normalised = torch.zeros(3, *padded)
    normalised[:, :height, :width] = ((expected / 255 - mean) / std).permute(2, 0, 1)
    assert torch.equal(batch[0], normalised)


@settings(deadline=None)
@given(sides, sides, sides, sides)
def test_bytes_are_pillows(height: int, width: int, new_height: int, new_width: int) -> None:
    check(noise(height, width), (new_height, new_width))


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((1, 1), (800, 800)),
        ((1, 3000), (1, 1333)),
        ((3000, 1), (1333, 1)),
        ((1080, 1920), (750, 1333)),
        ((480, 640), (800, 1067)),
        ((900, 600), (9, 6)),
        ((2, 2), (2, 2)),
    ],
)
def test_photographs_and_extremes_are_pillows(size: tuple[int, int], resized: tuple[int, int]) -> None:
    check(noise(*size), resized)


@pytest.mark.parametrize("size", [(480, 640), (427, 640), (640, 427), (1080, 1920)])
def test_a_picture_that_keeps_its_shape_is_pillows_in_one_call(size: tuple[int, int]) -> None:
    """Whatever the order of its two passes."""
    image, (height, width) = noise(*size), (size[0] * 5 // 8, size[1] * 5 // 8)
    direct = PIL.Image.fromarray(image.numpy()).resize((width, height), PIL.Image.Resampling.BILINEAR)
    assert np.array_equal(resize_bytes(image, (height, width)).numpy(), np.asarray(direct))


@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels_will_do(channels: int) -> None:
    image = noise(61, 47, channels)
    assert torch.equal(resize_bytes(image, (30, 99)), by_pillow(image, (30, 99)))


def test_images_of_a_batch_lie_each_in_its_own_corner_with_zeros_around() -> None:
    images, sizes = [noise(40, 60), noise(61, 47)[5:60:2, 3:40], noise(1, 1)], [(40, 60), (96, 80), (7, 7)]
    batch = pillow_resize_normalise_and_pad(images, sizes, (96, 128), mean=(0, 0, 0), std=(1, 1, 1))
    for image, (height, width), output in zip(images, sizes, batch, strict=True):
        alone = resize_bytes(image, (height, width)).permute(2, 0, 1) / 255
        assert torch.equal(output[:, :height, :width], alone)
        assert not output[:, height:].any()
        assert not output[:, :, width:].any()
