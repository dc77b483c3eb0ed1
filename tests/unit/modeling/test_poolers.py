from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from service import ops
from service.modeling.config import PatchOp, RoIConfig
from service.modeling.poolers import RoIPooler

CONFIGURED = [
    RoIConfig(op="roi_pool"),
    *(
        RoIConfig(op=op, sampling_ratio=points, aligned=aligned)
        for op in get_args(PatchOp)
        for points in (1, 3)
        for aligned in (False, True)
        # `roi_pool` has no parameters, and of one point the mean is the largest.
        if op in ("roi_align", "roi_warp") or (op == "roi_align_max" and points > 1)
    ),
]
STRIDES = {"0": 4, "1": 8, "2": 16, "3": 32}


def features(height: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(2, 5, -(-height // stride), -(-width // stride), generator=generator)
        for name, stride in STRIDES.items()
    }


def boxes(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([width, height])
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


def test_it_equals_torchvisions_pooler_over_all_levels() -> None:
    maps, size = features(640, 800), (640, 800)
    proposals = [boxes(40, *size), boxes(25, *size)]
    theirs = MultiScaleRoIAlign(list(STRIDES), output_size=7, sampling_ratio=2)(maps, proposals, [size, size])
    ours = RoIPooler(roi=RoIConfig(), output_size=7, strides=STRIDES)(maps, proposals, [size, size])
    torch.testing.assert_close(ours, theirs)


def test_scales_do_not_depend_on_the_first_batch() -> None:
    """torchvision infers scales from sizes: a 33-pixel image with maps of 9, 5, 3, 2 makes them wrong for good."""
    pooler = RoIPooler(roi=RoIConfig(), output_size=7, strides=STRIDES)
    pooler(features(33, 33), [boxes(2, 33, 33), boxes(2, 33, 33)], [(33, 33)] * 2)
    maps, size = features(640, 800), (640, 800)
    proposals = [boxes(40, *size), boxes(25, *size)]
    theirs = MultiScaleRoIAlign(list(STRIDES), output_size=7, sampling_ratio=2)(maps, proposals, [size, size])
    torch.testing.assert_close(pooler(maps, proposals, [size, size]), theirs)


def test_the_operator_and_its_parameters_are_the_configured_ones() -> None:
    maps, size = features(64, 64), (64, 64)
    proposals = [boxes(10, *size), boxes(0, *size)]
    answers = [RoIPooler(roi=roi, output_size=3, strides=STRIDES)(maps, proposals, [size, size]) for roi in CONFIGURED]
    for index, one in enumerate(answers):
        assert one.shape == (10, 5, 3, 3)
        assert all(not torch.allclose(one, other) for other in answers[index + 1 :])


def test_no_boxes_give_no_patches() -> None:
    pooled = RoIPooler(roi=RoIConfig(), output_size=7, strides=STRIDES)(
        features(64, 64), [boxes(0, 64, 64), boxes(0, 64, 64)], [(64, 64)] * 2
    )
    assert pooled.shape == (0, 5, 7, 7)


@pytest.mark.parametrize("op", get_args(PatchOp))
def test_each_operator_is_the_one_of_its_name(op: PatchOp) -> None:
    """Of one level, with the configured points: what `service.ops` answers when it is called by hand."""
    feature, proposals = {"2": features(160, 160)["2"]}, [boxes(12, 160, 160), boxes(7, 160, 160)]
    pooler = RoIPooler(roi=RoIConfig(op=op, sampling_ratio=3, aligned=True), output_size=5, strides={"2": 16})
    by_hand = getattr(ops, op)
    points = {} if op == "roi_pool" else {"sampling_ratio": 3, "aligned": True}
    torch.testing.assert_close(
        pooler(feature, proposals, [(160, 160)] * 2), by_hand(feature["2"], proposals, 5, 1 / 16, **points)
    )


def test_a_spatial_pyramid_has_the_bins_of_all_its_grids_in_a_row() -> None:
    maps, size = features(64, 64), (64, 64)
    proposals = [boxes(10, *size), boxes(0, *size)]
    pyramid = RoIPooler(roi=RoIConfig(op="spp"), output_size=(3, 1), strides=STRIDES)(maps, proposals, [size, size])
    grid = RoIPooler(roi=RoIConfig(op="roi_pool"), output_size=3, strides=STRIDES)(maps, proposals, [size, size])
    assert pyramid.shape == (10, 5, 10, 1)  # 3 x 3 + 1 x 1
    torch.testing.assert_close(pyramid[:, :, :9, 0], grid.flatten(2))
    torch.testing.assert_close(pyramid[:, :, 9, 0], grid.amax((2, 3)))


@pytest.mark.parametrize(
    "roi",
    [
        {},
        {"aligned": True},
        {"sampling_ratio": 3},
        {"sampling_ratio": 0},
        {"sampling_ratio": 0, "aligned": True},
        {"op": "roi_pool"},
    ],
)
@pytest.mark.parametrize("strides", [STRIDES, {"0": 32}])
def test_without_gradients_the_cpu_kernel_gives_the_same_patches(roi: dict[str, Any], strides: dict[str, int]) -> None:
    maps, size = features(640, 800), (640, 800)
    if len(strides) == 1:
        maps = {"0": maps["3"]}
    proposals = [boxes(40, *size), boxes(0, *size)]
    pooler = RoIPooler(roi=RoIConfig.model_validate(roi), output_size=7, strides=strides)
    with_gradients = pooler(maps, proposals, [size, size])
    with torch.inference_mode():
        without = pooler(maps, proposals, [size, size])
    assert without.is_contiguous(memory_format=torch.channels_last)  # as the kernel writes them
    torch.testing.assert_close(without, with_gradients, atol=1e-5, rtol=1e-5)


def test_boxes_too_large_for_adaptive_sampling_are_refused_without_gradients_too() -> None:
    pooler = RoIPooler(roi=RoIConfig(sampling_ratio=0), output_size=7, strides=STRIDES)
    huge = [torch.tensor([[0.0, 0.0, 9000.0, 9000.0]]), boxes(0, 64, 64)]
    with torch.inference_mode(), pytest.raises(ValueError, match="adaptive sampling"):
        pooler(features(64, 64), huge, [(64, 64)] * 2)
