"""Detectors in torchvision's layout: the `ModelConfig` for a builder's name, and what the names and shapes of a state
dict reveal about its network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from service.errors import ModelStoreError
from service.model_store.findings import WEIGHTS, Findings, Tables
from service.model_store.model_toml import validated
from service.modeling.backbone import models_with_features, torchvision_features
from service.modeling.config import ModelConfig

_V2 = {
    "backbone": {"name": "resnet50_fpn", "norm": "batch_norm", "fpn_norm": "batch_norm"},
    "rpn": {"head_conv_depth": 2},
    "roi": {"box_head_convs": (256, 256, 256, 256), "head_norm": "batch_norm"},
}
_MOBILENET = {"architecture": "faster_rcnn", "backbone": {"name": "mobilenet_v3_large_fpn"}}
_BUILDERS: Mapping[str, Tables] = {
    "fasterrcnn_resnet50_fpn": {"architecture": "faster_rcnn", "backbone": {"name": "resnet50_fpn"}},
    "fasterrcnn_resnet50_fpn_v2": {"architecture": "faster_rcnn", **_V2},
    "fasterrcnn_mobilenet_v3_large_fpn": _MOBILENET,
    "fasterrcnn_mobilenet_v3_large_320_fpn": {
        **_MOBILENET,
        "transform": {"min_size": 320, "max_size": 640},
        "rpn": {"pre_nms_top_n_test": 150, "post_nms_top_n_test": 150},
    },
    "maskrcnn_resnet50_fpn": {"architecture": "mask_rcnn", "backbone": {"name": "resnet50_fpn"}},
    "maskrcnn_resnet50_fpn_v2": {"architecture": "mask_rcnn", **_V2},
}
BUILDERS = tuple(_BUILDERS)
"""The torchvision builders whose networks are supported."""

_BODY, _FPN = "backbone.body.", "backbone.fpn."
_CLASS_BIAS = "roi_heads.box_predictor.cls_score.bias"
_BOX_WEIGHT = "roi_heads.box_predictor.bbox_pred.weight"
_MASK_WEIGHT = "roi_heads.mask_predictor.mask_fcn_logits.weight"
# By the number of blocks in the third stage, and (channels, channels a group) of the first block's 3 x 3 convolution.
_BOTTLENECKS = {
    (6, (64, 64)): "resnet50",
    (23, (64, 64)): "resnet101",
    (36, (64, 64)): "resnet152",
    (6, (128, 4)): "resnext50_32x4d",
    (23, (128, 4)): "resnext101_32x4d",
    (23, (256, 8)): "resnext101_32x8d",
    (23, (256, 4)): "resnext101_64x4d",
    (6, (128, 128)): "wide_resnet50_2",
    (23, (128, 128)): "wide_resnet101_2",
}
# `nn.Sequential(*resnet.children())`, the usual way to cut off the classifier.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_DEFAULT_ANCHORS = ((32.0, 64.0, 128.0, 256.0, 512.0), (0.5, 1.0, 2.0))
_CHANNELS = {1: "grey", 3: "rgb", 4: "rgba"}

_RENAMED = (
    (re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)"), r"\1.0.\2"),
    (re.compile(r"rpn\.head\.conv\.(weight|bias)"), r"rpn.head.conv.0.0.\1"),
)
_MASK_CONV = re.compile(r"roi_heads\.mask_head\.mask_fcn(\d+)\.(weight|bias)")
_STRANGERS = (
    ("roi_heads.keypoint_", "a Keypoint R-CNN: keypoints are not served"),
    ("roi_heads.box_predictor.0.", "a Cascade R-CNN, which has several box heads in a row; only one is served"),
    ("roi_head.bbox_head.0.", "a Cascade R-CNN, which has several box heads in a row; only one is served"),
    ("roi_head.mask_iou_head.", "a Mask Scoring R-CNN, which rates its masks apart; that is not served"),
    ("roi_heads.mask_coarse_head.", "a PointRend network, whose mask head is not served"),
    ("roi_heads.mask_head.coarse_head.", "a PointRend network, whose mask head is not served"),
)
_ONE_STAGE = (
    ("head.classification_head.", "a one-stage detector (RetinaNet, SSD or FCOS)"),
    ("bbox_head.retina_cls.", "a one-stage detector (RetinaNet)"),
    ("head.cls_score.", "a one-stage detector (RetinaNet)"),
    ("class_embed.", "a DETR"),
    ("transformer.encoder.", "a DETR"),
    ("fc.weight", "a classifier"),
    ("classifier.", "a classifier or a segmentation network"),
)


def builder_findings(builder: str) -> Findings:
    """The network that `torchvision.models.detection.<builder>` builds.

    Raises:
        ModelStoreError: that builder's network is not supported; the message lists the supported ones.
    """
    if builder not in _BUILDERS:
        raise ModelStoreError(f"no architecture {builder!r}; known: {', '.join(BUILDERS)}")
    found = Findings()
    for table, values in _BUILDERS[builder].items():
        if isinstance(values, Mapping):
            found.tell(table, builder, **values)
        else:
            found.tables[table] = values
    return found


def builder_config(builder: str, labels: Sequence[str], *, norm_eps: float = 1e-5) -> ModelConfig:
    """What `torchvision.models.detection.<builder>(num_classes=len(labels) + 1)` builds.

    Args:
        norm_eps: of the trunk's norms.

    Raises:
        ModelStoreError: as `builder_findings`, or the labels are not valid.
    """
    tables = builder_findings(builder).tables
    backbone = {**tables["backbone"], "norm_eps": norm_eps}
    return validated(builder, {**tables, "labels": labels, "backbone": backbone}, ModelConfig)


def inferred(state_dict: Mapping[str, Tensor]) -> Findings:
    """Infer the network of a state dict, as far as names and shapes determine it.

    Args:
        state_dict: in torchvision's layout, as returned by `in_torchvision_layout`.

    Raises:
        ModelStoreError: the network is not supported.
    """
    found = Findings()
    has_masks = any(key.startswith("roi_heads.mask_predictor.") for key in state_dict)
    found.tables["architecture"] = "mask_rcnn" if has_masks else "faster_rcnn"
    if "rpn.head.cls_logits.bias" not in state_dict:
        raise ModelStoreError(
            "the weights have no region proposal network: give a --model-config that says what kind they are of"
        )
    _find_trunk(found, state_dict)
    tell_norm(found, state_dict)
    _find_channels(found, state_dict)
    _find_rpn(found, state_dict)
    _find_heads(found, state_dict)
    return found


def _find_trunk(found: Findings, weights: Mapping[str, Tensor]) -> None:
    resnet = _resnet_name(weights)
    has_pyramid = f"{_FPN}inner_blocks.0.0.weight" in weights
    if has_pyramid and resnet is not None:
        found.tell("backbone", WEIGHTS, name=f"{resnet}_fpn")
        _find_pyramid(found, weights)
    elif has_pyramid and f"{_BODY}0.0.weight" in weights:
        found.tell("backbone", WEIGHTS, name="mobilenet_v3_large_fpn")
        found.doubt(
            "the weights fit fasterrcnn_mobilenet_v3_large_fpn and fasterrcnn_mobilenet_v3_large_320_fpn, which differ "
            "in their thresholds and image size only: say which with --architecture",
            "transform.min_size",
        )
    elif has_pyramid:
        raise ModelStoreError("the weights' names do not tell which trunk the pyramid is of: give a --model-config")
    elif resnet is not None and "roi_heads.box_head.layer4.0.conv1.weight" in weights:
        found.tell("backbone", WEIGHTS, name=f"{resnet}_c4")
    elif resnet is not None:
        if f"{_BODY}layer4.0.conv1.weight" not in weights:
            raise ModelStoreError(
                f"the weights are of a {resnet} that ends with an earlier stage than its last, without res5 in its box "
                "head: no model.toml can describe that"
            )
        found.tell("backbone", WEIGHTS, name=f"{resnet}_c5")
    else:
        _find_features(found, weights)
    width = len(weights[f"{_BODY}conv1.weight"]) if resnet == "narrow_resnet18" else None
    if width is not None:
        found.tell("backbone", WEIGHTS, width=width)


def _resnet_name(weights: Mapping[str, Tensor]) -> str | None:
    blocks = _count(weights, f"{_BODY}layer3.")
    first = weights.get(f"{_BODY}layer1.0.conv2.weight")
    if not blocks or first is None or first.ndim != 4:
        return None
    if f"{_BODY}layer1.0.conv3.weight" in weights:
        return _BOTTLENECKS.get((blocks, (first.shape[0], first.shape[1])))
    if first.shape[0] != 64:
        return "narrow_resnet18" if blocks == 2 else None
    return {2: "resnet18", 6: "resnet34"}.get(blocks)


def _find_pyramid(found: Findings, weights: Mapping[str, Tensor]) -> None:
    levels = _count(weights, f"{_FPN}inner_blocks.")
    last = "conv3" if f"{_BODY}layer1.0.conv3.weight" in weights else "conv2"
    finest = len(weights[f"{_BODY}layer1.0.{last}.weight"])
    inputs = [weights[f"{_FPN}inner_blocks.{level}.0.weight"] for level in range(levels)]
    stages = tuple(round(math.log2(one.shape[1] / finest)) + 1 for one in inputs)
    found.tell("backbone", WEIGHTS, out_channels=len(inputs[0]))
    if stages != (1, 2, 3, 4):
        found.tell("backbone", WEIGHTS, returned_layers=stages)
    extra = weights.get(f"{_FPN}extra_blocks.p6.weight")
    if extra is not None:
        kind = "p6p7" if extra.shape[1] == len(inputs[0]) else "p6p7_on_c5"
        found.tell("backbone", WEIGHTS, extra_blocks=kind)
    norm = _norm_at(weights, f"{_FPN}inner_blocks.0.1.")
    if norm is not None:
        found.tell("backbone", WEIGHTS, fpn_norm=norm)


def _find_features(found: Findings, weights: Mapping[str, Tensor]) -> None:
    """Find a trunk that is the `.features` of one of torchvision's classifiers, or their first parts."""
    given = _shapes({key.removeprefix(_BODY): tensor for key, tensor in weights.items() if key.startswith(_BODY)})
    for model in models_with_features():
        with torch.device("meta"):
            features = torchvision_features(model)
        parts = [name for name, _ in features.named_children()]
        stop = 1 + max(
            (parts.index(key.partition(".")[0]) for key in given if key.partition(".")[0] in parts), default=-1
        )
        kept = set(parts[:stop])
        expected = _shapes({key: one for key, one in features.state_dict().items() if key.partition(".")[0] in kept})
        if not stop or not _same_but_for_channels(given, expected):
            continue
        found.tell("backbone", WEIGHTS, name=f"torchvision/{model}")
        # After the last weights there may be an activation and a pooling, which have no weights.
        silent = len(parts) - stop
        if silent and all(not list(one.parameters()) for one in features[stop:]):
            found.doubt(
                f"the weights are of torchvision's {model}.features, whose last part is a pooling without weights: say "
                f"in a --model-config whether it is kept ([backbone] features_stop = {len(parts)}) or left out, as in "
                f"features[:-1] (features_stop = {len(parts) - 1})",
                "backbone.features_stop",
            )
        elif silent:
            found.tell("backbone", WEIGHTS, features_stop=stop)
        return
    raise ModelStoreError("the weights' names do not tell which network they are of: give a --model-config")


def _same_but_for_channels(given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether all shapes agree, except for the first convolution's input channels."""
    if given.keys() != expected.keys():
        return False
    first = next(iter(expected))
    return all(
        given[key] == shape or (key == first and given[key][:1] + given[key][2:] == shape[:1] + shape[2:])
        for key, shape in expected.items()
    )


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(one.shape) for key, one in weights.items() if not key.endswith(".num_batches_tracked")}


def tell_norm(found: Findings, weights: Mapping[str, Tensor]) -> None:
    """Record the trunk's norm: batch norms count their batches, group norms have no statistics."""
    norm = _norm_of(key for key in weights if key.startswith((_BODY, "roi_heads.box_head.layer4.")))
    name = found.get("backbone.name")
    if norm is None or (norm == "group_norm" and "resne" not in name):
        return
    found.tell("backbone", WEIGHTS, norm=norm)
    if norm == "group_norm":
        found.notes.append("the norms are of groups, whose number no weight tells: taken to be 32")
    if norm == "frozen_batch_norm" and name == "resnet50_fpn":
        found.notes.append(
            "the norms are frozen ones, whose epsilon no weight tells: 0 in what was fine-tuned from torchvision's "
            "published fasterrcnn_resnet50_fpn or maskrcnn_resnet50_fpn (weights='DEFAULT'), which needs --norm-eps 0"
        )


def _norm_at(weights: Mapping[str, Tensor], prefix: str) -> str | None:
    """The kind of norm at this name, None if there is none."""
    return _norm_of(key for key in weights if key.startswith(prefix))


def _norm_of(keys: Iterable[str]) -> str | None:
    """The kind of norm among these names, None if there is none."""
    last_parts = [key.split(".")[-2:] for key in keys]
    if any(parts[-1] == "num_batches_tracked" for parts in last_parts):
        return "batch_norm"
    if any(parts[-1] == "running_mean" for parts in last_parts):
        return "frozen_batch_norm"
    is_group = any(re.fullmatch(r"bn\d|1|norm\d?", parts[0]) for parts in last_parts if len(parts) == 2)
    return "group_norm" if is_group else None


def _find_channels(found: Findings, weights: Mapping[str, Tensor]) -> None:
    first = next((one for key, one in weights.items() if key.startswith(_BODY) and one.ndim == 4), None)
    count = 3 if first is None else first.shape[1]
    if count == 3:
        return
    if count not in _CHANNELS:
        raise ModelStoreError(f"expected a first convolution of 1, 3 or 4 channels, got {count}")
    found.tell("transform", WEIGHTS, channels=_CHANNELS[count])
    found.doubt(
        f"the first convolution reads {count} channel(s), {_CHANNELS[count]}, for which no mean and deviation are "
        f"usual: give transform.mean and transform.std of {count} number(s) each in a --model-config",
        "transform.mean",
        "transform.std",
    )


def _find_rpn(found: Findings, weights: Mapping[str, Tensor]) -> None:
    if (depth := _count(weights, "rpn.head.conv.")) > 1:
        found.tell("rpn", WEIGHTS, head_conv_depth=depth)
    per_place = len(weights["rpn.head.cls_logits.bias"])
    name = found.get("backbone.name")
    levels = _levels(found)
    sizes, ratios = _DEFAULT_ANCHORS
    usual = len(ratios) if levels == 5 else len(sizes) * len(ratios)
    if levels in (5, 1) or name == "mobilenet_v3_large_fpn":
        if levels == 1:
            found.assume("anchors", sizes=(sizes,))
        if per_place == usual:
            return
    found.doubt(
        f"anchors of {per_place} a place on {levels} map(s), where torchvision's default has none or another number: "
        "give anchors.sizes and anchors.aspect_ratios in a --model-config",
        "anchors.sizes",
    )


def _levels(found: Findings) -> int:
    """The number of feature maps that the RPN sees."""
    name = found.get("backbone.name")
    if name == "mobilenet_v3_large_fpn":
        return 3
    if not name.endswith("_fpn"):
        return 1
    extra = found.get("backbone.extra_blocks")
    return len(found.get("backbone.returned_layers") or (1, 2, 3, 4)) + (1 if extra is None else 2)


def _find_heads(found: Findings, weights: Mapping[str, Tensor]) -> None:
    box, mask = "roi_heads.box_head.", "roi_heads.mask_head."
    if f"{box}fc6.weight" in weights:
        bins = weights[f"{box}fc6.weight"].shape[1] / _map_channels(found, weights)
        side = math.isqrt(round(bins))
        if side * side != bins or not side:
            raise ModelStoreError(
                f"the box head sees {bins:g} values of each channel, which is no square patch: give a --model-config"
            )
        found.tell("roi", WEIGHTS, box_output_size=side, box_head_channels=len(weights[f"{box}fc6.weight"]))
    elif f"{box}0.0.weight" in weights:
        convs = [key for key in weights if re.fullmatch(rf"{re.escape(box)}\d+\.0\.weight", key)]
        hidden = [key for key in weights if re.fullmatch(rf"{re.escape(box)}\d+\.weight", key)]
        if len(hidden) != 1:
            raise ModelStoreError(f"expected one hidden layer behind the box head's convolutions, got {len(hidden)}")
        found.tell("roi", WEIGHTS, box_head_convs=tuple(len(weights[key]) for key in convs))
        found.tell("roi", WEIGHTS, box_head_channels=len(weights[hidden[0]]))
        bins = weights[hidden[0]].shape[1] / len(weights[convs[-1]])
        found.tell("roi", WEIGHTS, box_output_size=math.isqrt(round(bins)))
    norm = _norm_at(weights, f"{box}0.1.") or _norm_at(weights, f"{mask}0.1.")
    if norm is not None and f"{box}layer4.0.conv1.weight" not in weights:
        found.tell("roi", WEIGHTS, head_norm=norm)
    if found.tables["architecture"] == "mask_rcnn":
        convs = [key for key in weights if re.fullmatch(rf"{re.escape(mask)}\d+\.0\.weight", key)]
        finer = weights.get("roi_heads.mask_predictor.conv5_mask.weight")
        channels = tuple(len(weights[key]) for key in convs) or (() if finer is None else (finer.shape[1],))
        if channels:
            found.tell("roi", WEIGHTS, mask_head_channels=channels)


def _map_channels(found: Findings, weights: Mapping[str, Tensor]) -> int:
    """Channels of the maps that RoIs are pooled from; the RPN's first convolution reads the same maps."""
    first = weights.get("rpn.head.conv.0.0.weight")
    return 256 if first is None or first.ndim != 4 else first.shape[1]


def _count(weights: Mapping[str, Any], prefix: str) -> int:
    """The number of numbered parts below a name."""
    return len({key[len(prefix) :].partition(".")[0] for key in weights if key.startswith(prefix)})


def num_labels(state_dict: Mapping[str, Tensor]) -> int:
    """The number of classes in the weights, without the background.

    Raises:
        ModelStoreError: the weights are not those of a detector in torchvision's layout.
    """
    for start, words in _STRANGERS:
        if any(key.startswith(start) for key in state_dict):
            raise ModelStoreError(f"expected a Faster or Mask R-CNN, got {words}")
    if _CLASS_BIAS not in state_dict or state_dict[_CLASS_BIAS].ndim != 1:
        some = ", ".join(key[:80] for key in list(state_dict)[:3])
        known = next((words for start, words in _ONE_STAGE if any(key.startswith(start) for key in state_dict)), None)
        hint = f": it looks like {known}" if known else ""
        raise ModelStoreError(
            "expected a detector in torchvision's, detectron2's or mmdetection's layout, got weights named "
            f"{some}, …{hint}"
        )
    return len(state_dict[_CLASS_BIAS]) - 1


def with_current_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with torchvision's names since 0.13 (its published files have older ones), and with the names of
    `IntermediateLayerGetter` for a trunk that was wrapped by hand.
    """
    return _with_trunk_as_body({_current_name(key): tensor for key, tensor in state_dict.items()})


def _current_name(key: str) -> str:
    for pattern, replacement in _RENAMED:
        if pattern.fullmatch(key):
            return pattern.sub(replacement, key)
    mask_conv = _MASK_CONV.fullmatch(key)
    return f"roi_heads.mask_head.{int(mask_conv[1]) - 1}.0.{mask_conv[2]}" if mask_conv else key


def _with_trunk_as_body(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    trunk = [key for key in weights if key.startswith("backbone.") and not key.startswith(_FPN)]
    prefix = _BODY if all(key.startswith(_BODY) for key in trunk) else _shared_parts(trunk)
    names = {key: key[len(prefix) :] for key in trunk}
    is_cut_resnet = any(re.fullmatch(r"4\.0\.conv1\.weight", name) for name in names.values())
    for key, name in names.items():
        part, dot, rest = name.partition(".")
        if is_cut_resnet:
            name = f"{_CHILDREN.get(part, part)}{dot}{rest}"
        weights[f"{_BODY}{name}"] = weights.pop(key)
    return weights


def _shared_parts(names: Sequence[str]) -> str:
    """The leading parts that all names share, except for the last two: `features.0.weight` keeps `0.weight`."""
    first, last = min(names).split("."), max(names).split(".")
    shared = 0
    while shared < min(len(first), len(last)) - 2 and first[shared] == last[shared]:
        shared += 1
    return "".join(f"{part}." for part in first[:shared])


def with_class_specific_outputs(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Convert class-agnostic box and mask outputs to class-specific ones, by repeating them for every class.

    Returns:
        The weights, and a line for each output that was repeated.
    """
    classes = len(weights[_CLASS_BIAS]) if _CLASS_BIAS in weights else 0
    repeated, notes = dict(weights), []
    for name, rows, words in ((_BOX_WEIGHT, 4, "boxes"), (_MASK_WEIGHT, 1, "masks")):
        if classes >= 2 and name in weights and len(weights[name]) == rows:
            for key in (name, name.replace("weight", "bias")):
                if key in weights:
                    repeated[key] = weights[key].repeat(classes, *[1] * (weights[key].ndim - 1))
            if classes > 2:
                notes.append(
                    f"{words} are the same for all classes (class-agnostic): the output is stored once for each"
                )
    return repeated, notes
