"""Detectors as torchvision builds them: what a builder's name means as a `ModelConfig`, and what a state dict says of
the network that it is from. Called by `importing.py`, `detectron2_layout.py` and `published.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from service.errors import ModelStoreError
from service.model_store.model_toml import validated
from service.modeling.config import ModelConfig

_MOBILENET = {
    "architecture": "faster_rcnn",
    "backbone": {"name": "mobilenet_v3_large_fpn"},
    "anchors": {"sizes": ((32, 64, 128, 256, 512),) * 3},
}
_V2 = {
    "backbone": {"name": "resnet50_fpn", "norm": "batch_norm", "fpn_norm": "batch_norm"},
    "rpn": {"head_conv_depth": 2},
    "roi": {"box_head_convs": (256, 256, 256, 256), "head_norm": "batch_norm"},
}
_BUILDERS: Mapping[str, dict[str, Any]] = {
    "fasterrcnn_resnet50_fpn": {"architecture": "faster_rcnn", "backbone": {"name": "resnet50_fpn"}},
    "fasterrcnn_resnet50_fpn_v2": {"architecture": "faster_rcnn", **_V2},
    "fasterrcnn_mobilenet_v3_large_fpn": {**_MOBILENET, "rpn": {"score_thresh": 0.05}},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {
        **_MOBILENET,
        "transform": {"min_size": 320, "max_size": 640},
        "rpn": {"score_thresh": 0.05, "pre_nms_top_n_test": 150, "post_nms_top_n_test": 150},
    },
    "maskrcnn_resnet50_fpn": {"architecture": "mask_rcnn", "backbone": {"name": "resnet50_fpn"}},
    "maskrcnn_resnet50_fpn_v2": {"architecture": "mask_rcnn", **_V2},
}
BUILDERS = tuple(_BUILDERS)
"""Names of torchvision's builders whose networks we have."""

# What the papers have on ResNet's fourth stage, as `docs/models.md` says it; torchvision has no builder for it.
_C4 = {
    "anchors": {"sizes": ((32, 64, 128, 256, 512),)},
    "rpn": {"pre_nms_top_n_train": 12_000, "pre_nms_top_n_test": 6000, "post_nms_top_n_test": 300},
    "roi": {"box_output_size": 14, "mask_head_channels": (256,), "batch_size_per_image": 64},
}

_CLASS_BIAS = "roi_heads.box_predictor.cls_score.bias"
_RESNETS = {(2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101"}
"""By the number of blocks in the third stage, and whether they are bottlenecks."""

_RENAMED = (
    (re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)"), r"\1.0.\2"),
    (re.compile(r"rpn\.head\.conv\.(weight|bias)"), r"rpn.head.conv.0.0.\1"),
)
_MASK_CONV = re.compile(r"roi_heads\.mask_head\.mask_fcn(\d+)\.(weight|bias)")


def builder_config(builder: str, labels: Sequence[str], *, norm_eps: float = 1e-5) -> ModelConfig:
    """What `torchvision.models.detection.<builder>(num_classes=len(labels) + 1)` builds.

    Args:
        norm_eps: of the trunk's norms.

    Raises:
        ModelStoreError: we do not have that builder's network (lists those that we have), or the labels are not valid.
    """
    if builder not in _BUILDERS:
        raise ModelStoreError(f"no architecture {builder!r}; known: {', '.join(BUILDERS)}")
    document = _BUILDERS[builder]
    backbone = {**document["backbone"], "norm_eps": norm_eps}
    return validated(builder, {**document, "labels": labels, "backbone": backbone}, ModelConfig)


def inferred_config(state_dict: Mapping[str, Tensor], labels: Sequence[str], *, norm_eps: float = 1e-5) -> ModelConfig:
    """The network that a state dict is from, as far as keys and shapes tell: the six builders', with any ResNet, and
    ResNet-50 and 101 on C4.

    Raises:
        ModelStoreError: they do not tell.
    """
    if "backbone.body.0.0.weight" in state_dict:
        raise ModelStoreError(
            "the weights fit fasterrcnn_mobilenet_v3_large_fpn and fasterrcnn_mobilenet_v3_large_320_fpn, which differ "
            "in their thresholds and image size only: say which with --architecture"
        )
    blocks = {key.split(".")[3] for key in state_dict if key.startswith("backbone.body.layer3.")}
    resnet = _RESNETS.get((len(blocks), "backbone.body.layer3.0.conv3.weight" in state_dict))
    has_masks = "roi_heads.mask_predictor.conv5_mask.weight" in state_dict
    if resnet in ("resnet50", "resnet101") and "roi_heads.box_head.layer4.0.conv1.weight" in state_dict:
        document = {**_C4, "architecture": "mask_rcnn" if has_masks else "faster_rcnn", "labels": labels}
        document["backbone"] = {"name": f"{resnet}_c4", "norm_eps": norm_eps}
        return validated(f"{resnet}_c4", document, ModelConfig)
    if resnet is None or "backbone.fpn.inner_blocks.0.0.weight" not in state_dict:
        raise ModelStoreError("the weights' names do not tell which network they are of: give a --model-config")
    architecture = "maskrcnn" if has_masks else "fasterrcnn"
    version = "_v2" if "backbone.fpn.inner_blocks.0.1.weight" in state_dict else ""
    config = builder_config(f"{architecture}_resnet50_fpn{version}", labels, norm_eps=norm_eps)
    return with_backbone(config, name=f"{resnet}_fpn")


def with_norm_of(state_dict: Mapping[str, Tensor], config: ModelConfig) -> ModelConfig:
    """The configuration with the trunk's norm that the state dict is from: one that trains counts its batches."""
    counts = any(key.startswith("backbone.body.") and key.endswith(".num_batches_tracked") for key in state_dict)
    return with_backbone(config, norm="batch_norm" if counts else "frozen_batch_norm")


def with_backbone(config: ModelConfig, **changes: object) -> ModelConfig:
    """The configuration with other values in its `[backbone]`."""
    return config.model_copy(update={"backbone": config.backbone.model_copy(update=changes)})


def num_labels(state_dict: Mapping[str, Tensor]) -> int:
    """Classes that the weights know, without the background.

    Raises:
        ModelStoreError: they are not of a detector in torchvision's layout.
    """
    if _CLASS_BIAS not in state_dict:
        some = ", ".join(list(state_dict)[:3])
        raise ModelStoreError(
            f"expected a detector in torchvision's or detectron2's layout, got weights named {some}, …"
        )
    return len(state_dict[_CLASS_BIAS]) - 1


def with_current_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the names that torchvision gives since 0.13; its published files have older ones."""
    return {_current_name(key): tensor for key, tensor in state_dict.items()}


def _current_name(key: str) -> str:
    for pattern, replacement in _RENAMED:
        if pattern.fullmatch(key):
            return pattern.sub(replacement, key)
    mask_conv = _MASK_CONV.fullmatch(key)
    return f"roi_heads.mask_head.{int(mask_conv[1]) - 1}.0.{mask_conv[2]}" if mask_conv else key
