"""Detectors as detectron2 names and lays them out: Faster and Mask R-CNN on a ResNet, with a pyramid (FPN) or on its
fourth stage (C4), brought into torchvision's layout. Called by `importing.py`.

What differs besides the names: the first convolution reads BGR, in 0 to 255; the background is the last class, not
the first, and has no box deltas and no mask; bottlenecks stride in their first convolution; anchors are not rounded;
RoI Align shifts by half a pixel and adapts its number of samples.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from service.model_store.torchvision_layout import inferred_config
from service.modeling.config import ModelConfig

_TRUNKS = ("backbone.bottom_up.", "backbone.res2.")
"""Below a pyramid the trunk is a part of the backbone; on C4 it is all of it."""
# Constants of the network that some releases have stored with the weights.
_CONSTANTS = re.compile(r"pixel_mean|pixel_std|proposal_generator\.anchor_generator\.cell_anchors\.\d+")
_PIXEL_MEAN_BGR = torch.tensor([103.530, 116.280, 123.675])
_PIXEL_STD_BGR = torch.ones(3)

_RENAMED = (
    (re.compile(r"backbone\.(?:bottom_up\.)?stem\.conv1\.norm\."), r"backbone.body.bn1."),
    (re.compile(r"backbone\.(?:bottom_up\.)?stem\."), r"backbone.body."),
    (re.compile(r"(res\d\.\d+)\.conv(\d)\.norm\."), r"\1.bn\2."),
    (re.compile(r"(res\d\.\d+)\.shortcut\.norm\."), r"\1.downsample.1."),
    (re.compile(r"(res\d\.\d+)\.shortcut\."), r"\1.downsample.0."),
    (re.compile(r"proposal_generator\.rpn_head\.conv\."), r"rpn.head.conv.0.0."),
    (re.compile(r"proposal_generator\.rpn_head\.objectness_logits\."), r"rpn.head.cls_logits."),
    (re.compile(r"proposal_generator\.rpn_head\.anchor_deltas\."), r"rpn.head.bbox_pred."),
    (re.compile(r"roi_heads\.box_head\.fc1\."), r"roi_heads.box_head.fc6."),
    (re.compile(r"roi_heads\.box_head\.fc2\."), r"roi_heads.box_head.fc7."),
    (re.compile(r"roi_heads\.mask_head\.deconv\."), r"roi_heads.mask_predictor.conv5_mask."),
    (re.compile(r"roi_heads\.mask_head\.predictor\."), r"roi_heads.mask_predictor.mask_fcn_logits."),
)
# detectron2 counts stages as the paper does, from 2; torchvision's layers and pyramid levels begin with 1 and 0.
_NUMBERED = (
    (re.compile(r"backbone\.(?:bottom_up\.)?res(\d)\."), "backbone.body.layer{}.", 1),
    (re.compile(r"roi_heads\.res(\d)\."), "roi_heads.box_head.layer{}.", 1),
    (re.compile(r"backbone\.fpn_lateral(\d)\."), "backbone.fpn.inner_blocks.{}.0.", 2),
    (re.compile(r"backbone\.fpn_output(\d)\."), "backbone.fpn.layer_blocks.{}.0.", 2),
    (re.compile(r"roi_heads\.mask_head\.mask_fcn(\d)\."), "roi_heads.mask_head.{}.0.", 1),
)


def is_detectron2(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are detectron2's."""
    return any(key.startswith(_TRUNKS) for key in state_dict)


def with_torchvision_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same network in torchvision's layout: names, order of colours, order of classes.

    A name that detectron2 does not give to its Faster and Mask R-CNN stays, and is reported as surplus by `load_into`.
    """
    kept = {key: tensor for key, tensor in state_dict.items() if not _CONSTANTS.fullmatch(key)}
    renamed = {_torchvision_name(key): tensor for key, tensor in kept.items()}
    return {key: _torchvision_order(key, tensor) for key, tensor in renamed.items()}


def detectron2_config(state_dict: Mapping[str, Tensor], labels: Sequence[str]) -> ModelConfig:
    """The network of detectron2's model zoo (ResNet-50 or 101, FPN or C4) that a state dict, as it was read, is from.

    Raises:
        ModelStoreError: it is of no such network, or the labels are not valid.
    """
    config = inferred_config(with_torchvision_names(state_dict), labels)
    mean, std = (
        tuple((state_dict.get(key, default).flatten().flip(0) / 255).tolist())
        for key, default in (("pixel_mean", _PIXEL_MEAN_BGR), ("pixel_std", _PIXEL_STD_BGR))
    )
    changes = {
        "backbone": {"stride_in_1x1": True},
        "transform": {"mean": mean, "std": std},
        "anchors": {"style": "detectron2"},
        "rpn": {"post_nms_top_n_test": 1000} if config.backbone.has_res5_head else {"post_nms_top_n_train": 1000},
        "roi": {
            "sampling_ratio": 0,
            "aligned": True,
            "box_weights": (10.0, 10.0, 5.0, 5.0),
            "batch_size_per_image": 512,
        },
    }
    tables = {name: getattr(config, name).model_copy(update=table) for name, table in changes.items()}
    return config.model_copy(update=tables)


def _torchvision_name(key: str) -> str:
    for pattern, replacement in _RENAMED:
        key = pattern.sub(replacement, key)
    for pattern, template, first in _NUMBERED:
        if match := pattern.match(key):
            key = template.format(int(match[1]) - first) + key[match.end() :]
    return key


def _torchvision_order(key: str, tensor: Tensor) -> Tensor:
    if key == "backbone.body.conv1.weight":
        return tensor.flip(1)  # BGR to RGB
    if key.startswith("roi_heads.box_predictor.cls_score."):
        return tensor.roll(1, dims=0)  # the background from last to first
    if key.startswith("roi_heads.box_predictor.bbox_pred."):
        return _with_rows_in_front(tensor, 4)
    if key.startswith("roi_heads.mask_predictor.mask_fcn_logits."):
        return _with_rows_in_front(tensor, 1)
    return tensor


def _with_rows_in_front(tensor: Tensor, rows: int) -> Tensor:
    """With zeros for the background, which is never asked for its box or mask."""
    return torch.cat([tensor.new_zeros(rows, *tensor.shape[1:]), tensor])
