"""Networks of every family with random weights, for the engines' tests: small, and with scores that differ."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.structures import Image

SMALL: dict[str, Any] = {
    "labels": ["a", "b", "c"],
    "transform": {"min_size": 64, "max_size": 96},
    "rpn": {"pre_nms_top_n_test": 200, "post_nms_top_n_test": 40},
    "detections": {"score_thresh": 0.02, "detections_per_img": 20},
}
ONE_MAP = {"sizes": [[32, 64, 128, 256, 512]]}
FAMILIES: dict[str, dict[str, Any]] = {
    "fpn with masks": {
        "architecture": "mask_rcnn",
        "backbone": {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16, "norm": "batch_norm"},
        "roi": {"box_head_channels": 32, "mask_head_channels": [16]},
    },
    "fpn with norms and convolutions in the heads": {
        "architecture": "mask_rcnn",
        "backbone": {"name": "resnet18_fpn", "out_channels": 16, "norm": "batch_norm", "fpn_norm": "batch_norm"},
        "roi": {
            "box_head_convs": [16],
            "box_head_channels": 32,
            "mask_head_channels": [16],
            "head_norm": "batch_norm",
        },
    },
    "c4 with masks": {
        "architecture": "mask_rcnn",
        "backbone": {"name": "resnet50_c4"},
        "anchors": ONE_MAP,
        "rpn": {"pre_nms_top_n_test": 200, "post_nms_top_n_test": 10},
        "roi": {"mask_head_channels": [16]},
    },
    "vgg": {
        "architecture": "faster_rcnn",
        "backbone": {"name": "vgg16"},
        "anchors": ONE_MAP,
        "roi": {"op": "roi_pool", "box_head_channels": 32, "box_head_dropout": 0.5},
    },
    "c5": {
        "architecture": "faster_rcnn",
        "backbone": {"name": "narrow_resnet18_c5", "width": 8, "norm": "batch_norm"},
        "anchors": ONE_MAP,
        "roi": {"box_head_channels": 32},
    },
    "grouped convolutions": {
        "architecture": "faster_rcnn",
        "backbone": {"name": "resnext50_32x4d_fpn", "out_channels": 16},
        "roi": {"box_head_channels": 32},
    },
    "group norms, three maps and two convolutions, of grey pictures": {
        "architecture": "mask_rcnn",
        "backbone": {
            "name": "resnet18_fpn",
            "out_channels": 64,
            "norm": "group_norm",
            "fpn_norm": "group_norm",
            "returned_layers": [2, 3, 4],
            "extra_blocks": "p6p7",
        },
        "transform": {**SMALL["transform"], "channels": "grey", "mean": [0.5], "std": [0.2]},
        "anchors": {"sizes": [[16], [32], [48], [64], [96]]},
        "roi": {
            "box_head_convs": [64],
            "box_head_channels": 32,
            "mask_head_channels": [64],
            "head_norm": "group_norm",
        },
    },
    "features": {
        "architecture": "faster_rcnn",
        "backbone": {"name": "torchvision/mobilenet_v2", "features_stop": 14, "norm": "batch_norm"},
        "transform": {**SMALL["transform"], "channels": "rgba", "mean": [0.5] * 4, "std": [0.2] * 4},
        "anchors": ONE_MAP,
        "roi": {"box_head_channels": 32},
    },
    "fast r-cnn": {
        "architecture": "fast_rcnn",
        "backbone": {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16, "norm": "batch_norm"},
        "proposals": {"search_width": 32, "max_count": 20},
        "roi": {"box_head_channels": 32},
    },
    "timm": {
        "architecture": "faster_rcnn",
        "backbone": {"name": "timm/mambaout_femto", "out_channels": 16},
        "roi": {"box_head_channels": 32},
    },
    "pyramid pooling": {
        "architecture": "faster_rcnn",
        "backbone": {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16},
        "roi": {"op": "spp", "box_head_channels": 32},
    },
    "mobilenet": {
        "architecture": "faster_rcnn",
        "backbone": {"name": "mobilenet_v3_large_fpn", "norm": "batch_norm"},
        "anchors": {"sizes": [[32, 64, 128, 256, 512]] * 3},
        "roi": {"box_head_channels": 32},
    },
}


def config_of(family: str) -> ModelConfig:
    """The configuration of one of `FAMILIES`."""
    document = SMALL | FAMILIES[family]
    if document["architecture"] == "fast_rcnn":
        document = {table: keys for table, keys in document.items() if table != "rpn"}
    return ModelConfig.model_validate(document)


def _build(family: str) -> GeneralizedRCNN:
    if family.startswith("timm"):
        pytest.importorskip("timm", reason="the extra 'timm' is not installed")
    return build_model(config_of(family))


@cache
def weights_of(family: str) -> dict[str, torch.Tensor]:
    """Random weights, as trained ones are: activations of order 1, some classes surer than others."""
    torch.manual_seed(0)
    model = _build(family)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = None  # a plain average over what comes
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(std=0.1)
        model.train()
        model.backbone(torch.randn(2, model.transform.num_channels, 128, 128))
        model.eval()
        model.roi_heads.box_predictor.cls_score.weight.mul_(20)
        if model.rpn.head is not None:
            logits = model.rpn.head.get_submodule("cls_logits")
            assert isinstance(logits, torch.nn.Conv2d)
            logits.weight.mul_(20)
    return model.state_dict()


def network(family: str) -> GeneralizedRCNN:
    """A network of its own, in evaluation mode; the same weights every time."""
    model = _build(family)
    model.load_state_dict(weights_of(family))
    return model.eval()


def picture(height: int, width: int, *, seed: int = 0) -> Image:
    """Soft random blobs."""
    coarse = np.random.default_rng(seed).random((1, 3, 6, 8), dtype=np.float32)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), (height, width), mode="bicubic").clamp(0, 1)[0]
    return Image(np.ascontiguousarray((smooth.permute(1, 2, 0).numpy() * 255).astype(np.uint8)))
