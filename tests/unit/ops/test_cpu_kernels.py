"""The CPU kernels over all levels: torchvision's operators, box by box, whatever the boxes are like."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align, roi_pool

from service.ops._cpu_kernels import (
    OutputMemory,
    _neighbours_together,
    multi_scale_roi_align_channels_last,
    multi_scale_roi_pool_channels_last,
)

SCALES = [1 / 4, 1 / 8, 1 / 16]


def pyramid(generator: torch.Generator, *, images: int = 2, channels: int = 5) -> list[Tensor]:
    """Features of 160 x 120 images."""
    sizes = [(math.ceil(120 * scale), math.ceil(160 * scale)) for scale in SCALES]
    features = [torch.randn(images, channels, *size, generator=generator) for size in sizes]
    return [feature.contiguous(memory_format=torch.channels_last) for feature in features]


def any_rois(generator: torch.Generator, number: int = 60) -> tuple[Tensor, Tensor]:
    """Small and large boxes, whole and fractional, inside, across and outside the image, some points and lines."""
    centers = torch.rand(number, 2, generator=generator) * torch.tensor([240.0, 200.0]) - 40
    sides = torch.rand(number, 2, generator=generator) ** 2 * 300
    sides[::7], sides[1::7, 0] = 0, 0
    boxes = torch.cat([centers - sides / 2, centers + sides / 2], dim=1)
    boxes[::2] = boxes[::2].round()
    images = torch.randint(0, 2, (number, 1), generator=generator)
    return torch.cat([images, boxes], dim=1), torch.randint(0, len(SCALES), (number,), generator=generator)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
@pytest.mark.parametrize("output_size", [(7, 7), (3, 5), (1, 1)])
def test_roi_align_is_torchvisions_on_each_boxs_level(
    output_size: tuple[int, int], sampling_ratio: int, aligned: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    features, (rois, levels) = pyramid(generator), any_rois(generator)
    pooled = multi_scale_roi_align_channels_last(features, rois, levels, SCALES, output_size, sampling_ratio, aligned)
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    for level, (feature, scale) in enumerate(zip(features, SCALES, strict=True)):
        expected = roi_align(feature, rois[levels == level], output_size, scale, sampling_ratio, aligned)
        torch.testing.assert_close(pooled[levels == level], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("output_size", [(7, 7), (3, 5), (1, 1)])
def test_roi_pool_is_torchvisions_on_each_boxs_level(output_size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    features, (rois, levels) = pyramid(generator), any_rois(generator)
    pooled = multi_scale_roi_pool_channels_last(features, rois, levels, SCALES, output_size)
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    for level, (feature, scale) in enumerate(zip(features, SCALES, strict=True)):
        expected = roi_pool(feature, rois[levels == level], output_size, scale)
        assert torch.equal(pooled[levels == level], expected)


def test_features_far_from_the_origin_lose_no_precision() -> None:
    """On a map 4000 cells wide the last bit of a coordinate is worth 2e-4 of a cell."""
    feature = torch.randn(1, 2, 3, 4000, generator=torch.Generator().manual_seed(2))
    rois = torch.tensor([[0, 15000.3, 0.7, 15877.9, 9.1]])
    pooled = multi_scale_roi_align_channels_last([feature], rois, torch.zeros(1).long(), [0.25], (7, 7), 2, False)
    torch.testing.assert_close(pooled, roi_align(feature, rois, (7, 7), 0.25, 2, False), rtol=0, atol=1e-5)


def test_features_in_torchs_default_layout_give_the_same() -> None:
    generator = torch.Generator().manual_seed(3)
    features, (rois, levels) = pyramid(generator), any_rois(generator)
    default = [feature.contiguous() for feature in features]
    expected = multi_scale_roi_align_channels_last(features, rois, levels, SCALES, (2, 2), 2, True)
    assert torch.equal(multi_scale_roi_align_channels_last(default, rois, levels, SCALES, (2, 2), 2, True), expected)


def test_no_boxes_give_an_empty_result() -> None:
    features = pyramid(torch.Generator().manual_seed(4))
    rois, levels = torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    assert multi_scale_roi_align_channels_last(features, rois, levels, SCALES, (7, 7), 2, False).shape == (0, 5, 7, 7)
    assert multi_scale_roi_pool_channels_last(features, rois, levels, SCALES, (7, 7)).shape == (0, 5, 7, 7)


def test_inside_out_box_averages_nothing() -> None:
    """torchvision's own kernel asks for a negative amount of memory."""
    feature, rois = torch.ones(1, 1, 8, 8), torch.tensor([[0, 6.0, 6.0, 2.0, 2.0]])
    pooled = multi_scale_roi_align_channels_last([feature], rois, torch.zeros(1).long(), [1.0], (2, 2), 0, True)
    assert torch.equal(pooled, torch.zeros(1, 1, 2, 2))


def test_boxes_are_pooled_in_an_order_that_keeps_neighbours_together() -> None:
    """Image by image, in each strip by strip of 128 pixels, in each from left to right."""
    below, right, left, other = [0, 0, 130, 9, 140], [0, 50, 0, 60, 9], [0, 0, 90, 9, 99], [1, 0, 0, 9, 9]
    rois = np.array([other, below, right, left], np.float32)
    assert rois[_neighbours_together(rois)].tolist() == [left, right, below, other]


def test_several_models_may_pool_at_once() -> None:
    """Each model predicts in a thread of its own; numba ends the process if two are in its loops."""
    generator = torch.Generator().manual_seed(5)
    features, (rois, levels) = pyramid(generator), any_rois(generator)
    alone = multi_scale_roi_align_channels_last(features, rois, levels, SCALES, (7, 7), 2, False)
    with ThreadPoolExecutor(4) as threads:
        jobs = [
            threads.submit(multi_scale_roi_align_channels_last, features, rois, levels, SCALES, (7, 7), 2, False)
            for _ in range(40)
        ]
    assert all(torch.equal(job.result(), alone) for job in jobs)


def test_memory_is_used_again_as_soon_as_nobody_holds_what_lies_in_it() -> None:
    """A view of a part, as torch's `split` gives, holds all of it."""
    generator = torch.Generator().manual_seed(5)
    features, (rois, levels) = pyramid(generator), any_rois(generator)
    memory = OutputMemory()
    first = multi_scale_roi_pool_channels_last(features, rois, levels, SCALES, (7, 7), memory=memory)
    part, expected, address = first[3:5, :1], first[3:5, :1].clone(), first.data_ptr()
    del first
    second = multi_scale_roi_pool_channels_last(features, rois.flip(0), levels.flip(0), SCALES, (7, 7), memory=memory)
    assert second.data_ptr() != address
    assert torch.equal(part, expected)
    address = second.data_ptr()
    del second
    fewer = multi_scale_roi_pool_channels_last(features, rois[:9], levels[:9], SCALES, (7, 7), memory=memory)
    assert fewer.data_ptr() == address
    assert torch.equal(fewer, multi_scale_roi_pool_channels_last(features, rois[:9], levels[:9], SCALES, (7, 7)))


def test_memory_for_more_than_is_kept_is_given_back() -> None:
    memory = OutputMemory()
    memory.take((17, 2**20))
    assert not memory._kept
