"""A folded network is the same function with fewer steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from service.inference.engines.folding import fold
from tests.unit.inference.engines.networks import FAMILIES, network


@pytest.mark.parametrize("family", FAMILIES)
def test_no_norm_is_left_and_the_maps_stay_the_same(family: str) -> None:
    plain, folded = network(family), network(family)
    fold(folded)
    assert not [one for one in folded.modules() if isinstance(one, nn.BatchNorm2d | FrozenBatchNorm2d)]
    channels = plain.transform.num_channels
    batch = torch.randn(1, channels, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = plain.backbone(batch), folded.backbone(batch)
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=float(one.abs().max()) * 1e-5)
