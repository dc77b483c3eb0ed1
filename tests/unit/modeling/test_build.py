from __future__ import annotations

from typing import Any

import torch

from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.modeling.generalized_rcnn import GeneralizedRCNN


def narrow(**tables: Any) -> GeneralizedRCNN:
    """A small network with the given tables."""
    backbone = {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16}
    config = {"architecture": "faster_rcnn", "labels": ["cell"], "backbone": backbone, **tables}
    return build_model(ModelConfig.model_validate(config))


def test_the_box_head_is_sized_to_the_bins_of_the_pyramid() -> None:
    model = narrow(roi={"op": "spp", "spp_levels": [3, 2], "box_head_channels": 32})
    assert model.roi_heads.box_head.fc6.weight.shape == (32, 16 * (9 + 4))
    found = model.eval()([torch.zeros(3, 64, 64)])[0]
    assert found["boxes"].shape[1] == 4
