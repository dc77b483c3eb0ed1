from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from service.modeling.config import RoIConfig
from service.modeling.poolers import RoIPooler

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
    answers = [
        RoIPooler(roi=RoIConfig.model_validate(roi), output_size=3, strides=STRIDES)(maps, proposals, [size, size])
        for roi in ({"op": "roi_pool"}, {"op": "roi_align"}, {"aligned": True}, {"sampling_ratio": 1})
    ]
    for index, one in enumerate(answers):
        assert one.shape == (10, 5, 3, 3)
        assert all(not torch.allclose(one, other) for other in answers[index + 1 :])


def test_no_boxes_give_no_patches() -> None:
    pooled = RoIPooler(roi=RoIConfig(), output_size=7, strides=STRIDES)(
        features(64, 64), [boxes(0, 64, 64), boxes(0, 64, 64)], [(64, 64)] * 2
    )
    assert pooled.shape == (0, 5, 7, 7)
