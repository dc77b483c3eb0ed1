from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from service.ops import assign_levels, multi_scale, roi_align, roi_align_max, roi_pool, roi_warp, spp
from tests.unit.ops.cases import NAN, box

STRIDES = (4, 8, 16, 32)
SCALES = [1 / stride for stride in STRIDES]


def pyramid(*, height: int = 256, width: int = 320, strides: tuple[int, ...] = STRIDES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, height // stride, width // stride, generator=generator) for stride in strides]


def boxes_of_all_sizes(count: int = 60) -> list[Tensor]:
    """(count, 4) float32 for each of two images, sides from 2 to 700 pixels, evenly in their logarithm."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.rand(2, count, 2, generator=generator) * 200
    sides = 2 * 350 ** torch.rand(2, count, 2, generator=generator)
    return list(torch.cat([starts, starts + sides], dim=2))


@pytest.mark.parametrize(
    ("side", "level"),
    [(224, 2), (223.9999, 2), (223.999, 1), (112, 1), (111.9, 0), (448, 3), (447.9, 2), (1, 0), (0, 0), (5000, 3)],
)
def test_level_is_that_of_equation_1(side: float, level: int) -> None:
    """224 pixels go to level 4, the third of 2..5, also when rounding has left a little less; half of it to level 3."""
    assert assign_levels(box(10, 10, 10 + side, 10 + side), min_level=2, max_level=5).tolist() == [level]


def test_level_depends_on_the_area_alone() -> None:
    assert assign_levels(box(0, 0, 448, 112), min_level=2, max_level=5).tolist() == [2]


def test_inside_out_box_takes_the_finest_level() -> None:
    assert assign_levels(box(500, 0, 0, 500), min_level=2, max_level=5).tolist() == [0]


def test_levels_are_those_of_torchvision() -> None:
    exact = torch.tensor([[0.0, 0.0, side, side] for side in (3, 28, 56, 112, 224, 448, 896)])
    boxes = [*boxes_of_all_sizes(500), exact]
    for dtype in (torch.float32, torch.float64):
        typed = [one.to(dtype) for one in boxes]
        expected = LevelMapper(2, 5)(typed)
        levels = assign_levels(typed, min_level=2, max_level=5)
        assert torch.equal(levels, expected)
        assert set(levels.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16), (16,), (32, 32)], ids=str)
def test_roi_align_of_a_pyramid_is_that_of_torchvision(strides: tuple[int, ...]) -> None:
    """(32, 32) is what torchvision's MobileNetV3 has: two maps of one stride, of which only the first is used."""
    features, boxes = pyramid(strides=strides), boxes_of_all_sizes()
    names = [str(index) for index in range(len(strides))]
    expected = MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2)(
        dict(zip(names, features, strict=True)), boxes, [(256, 320)] * 2
    )
    pooled = multi_scale(partial(roi_align, sampling_ratio=2), features, boxes, 7, [1 / stride for stride in strides])
    assert torch.equal(pooled, expected)


@pytest.mark.parametrize(
    ("op", "output_size"),
    [(roi_pool, 3), (roi_align, (2, 3)), (partial(roi_align_max, sampling_ratio=2), 3), (roi_warp, 3), (spp, (2, 1))],
)
def test_every_operator_pools_each_box_from_its_own_level_in_the_given_order(
    op: Callable[..., Tensor], output_size: int | tuple[int, ...]
) -> None:
    features, boxes = pyramid(), boxes_of_all_sizes(count=8)
    pooled = multi_scale(op, features, boxes, output_size, SCALES)
    levels = assign_levels(boxes, min_level=2, max_level=5).tolist()
    rois = [torch.cat([torch.tensor([float(image)]), one]) for image in (0, 1) for one in boxes[image]]
    assert len(set(levels)) > 1
    for row, (level, roi) in enumerate(zip(levels, rois, strict=True)):
        alone = op(features[level], roi.unsqueeze(0), output_size, SCALES[level])
        assert torch.equal(pooled[row], alone[0])


def test_gradient_reaches_the_level_of_a_box_and_no_other() -> None:
    features = [level.requires_grad_() for level in pyramid()]
    multi_scale(roi_align, features, [*box(0, 0, 130, 130), torch.zeros(0, 4)], 2, SCALES).sum().backward()
    assert [bool(level.grad is not None and level.grad.any()) for level in features] == [False, True, False, False]


def test_no_boxes_give_an_empty_answer() -> None:
    assert multi_scale(roi_pool, pyramid(), [torch.zeros(0, 4)] * 2, 7, SCALES).shape == (0, 3, 7, 7)
    assert multi_scale(spp, pyramid(), [torch.zeros(0, 4)] * 2, (2, 1), SCALES).shape == (0, 3, 5, 1)


def test_nan_is_refused_by_the_operator() -> None:
    with pytest.raises(ValueError, match="box coordinates that are finite"):
        multi_scale(roi_pool, pyramid(), [torch.tensor([[0, 0, NAN, 1]]), torch.zeros(0, 4)], 7, SCALES)


@pytest.mark.parametrize("scales", [[], [1 / 4], [1 / 4, 1 / 8, 1 / 16, 1 / 64], [1 / 32, 1 / 16, 1 / 8, 1 / 4]])
def test_scales_that_do_not_fit_the_levels_are_refused(scales: list[float]) -> None:
    with pytest.raises(ValueError, match=r"expected (one scale|scales from fine to coarse)"):
        multi_scale(roi_pool, pyramid(), boxes_of_all_sizes(), 7, scales)


def test_no_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="0 levels"):
        multi_scale(roi_pool, [], boxes_of_all_sizes(), 7, [])
