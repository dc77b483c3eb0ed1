"""Convert detectors from the layout of mmdetection 2 and 3 to torchvision's: Faster and Mask R-CNN on a ResNet or
ResNeXt with a pyramid.

Differences besides the names: the background is the last class and has no box deltas and no mask; anchors are not
rounded; RoI Align shifts by half a pixel and adapts its number of samples. Two styles of trunk have the same names:
`pytorch` reads RGB and strides like torchvision, `caffe` reads BGR and strides in the first convolution. If the file
holds the configuration as text, it is parsed, never executed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from service.errors import ModelStoreError
from service.model_store.detectron2_layout import torchvision_order
from service.model_store.findings import FILE, Findings
from service.model_store.torchvision_layout import inferred

_CAFFE_MEAN, _CAFFE_STD = (103.530, 116.280, 123.675), (1.0, 1.0, 1.0)
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_LONGEST_TEXT = 1_000_000
_CONFIG = f"{FILE}: its configuration"

_RENAMED = (
    (re.compile(r"backbone\.(?=conv1|bn1|layer\d)"), r"backbone.body."),
    (re.compile(r"neck\.lateral_convs\.(\d+)\.conv\."), r"backbone.fpn.inner_blocks.\1.0."),
    (re.compile(r"neck\.lateral_convs\.(\d+)\.(?:bn|gn)\."), r"backbone.fpn.inner_blocks.\1.1."),
    (re.compile(r"neck\.fpn_convs\.(\d+)\.conv\."), r"backbone.fpn.layer_blocks.\1.0."),
    (re.compile(r"neck\.fpn_convs\.(\d+)\.(?:bn|gn)\."), r"backbone.fpn.layer_blocks.\1.1."),
    (re.compile(r"rpn_head\.rpn_conv\.(\d+)\.conv\."), r"rpn.head.conv.\1.0."),
    (re.compile(r"rpn_head\.rpn_conv\."), r"rpn.head.conv.0.0."),
    (re.compile(r"rpn_head\.rpn_cls\."), r"rpn.head.cls_logits."),
    (re.compile(r"rpn_head\.rpn_reg\."), r"rpn.head.bbox_pred."),
    (re.compile(r"roi_head\.bbox_head\.fc_cls\."), r"roi_heads.box_predictor.cls_score."),
    (re.compile(r"roi_head\.bbox_head\.fc_reg\."), r"roi_heads.box_predictor.bbox_pred."),
    (re.compile(r"roi_head\.bbox_head\.shared_convs\.(\d+)\.conv\."), r"roi_heads.box_head.\1.0."),
    (re.compile(r"roi_head\.bbox_head\.shared_convs\.(\d+)\.(?:bn|gn)\."), r"roi_heads.box_head.\1.1."),
    (re.compile(r"roi_head\.mask_head\.convs\.(\d+)\.conv\."), r"roi_heads.mask_head.\1.0."),
    (re.compile(r"roi_head\.mask_head\.convs\.(\d+)\.(?:bn|gn)\."), r"roi_heads.mask_head.\1.1."),
    (re.compile(r"roi_head\.mask_head\.upsample\."), r"roi_heads.mask_predictor.conv5_mask."),
    (re.compile(r"roi_head\.mask_head\.conv_logits\."), r"roi_heads.mask_predictor.mask_fcn_logits."),
)
_HIDDEN = re.compile(r"roi_head\.bbox_head\.shared_fcs\.(\d+)\.")
_GROUP_NORM = re.compile(r"(backbone\.body\.(?:layer\d\.\d+\.)?)gn(\d)\.")


def is_mmdetection(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names follow mmdetection."""
    return any(key.startswith(("roi_head.", "rpn_head.", "neck.", "bbox_head.")) for key in state_dict)


def with_torchvision_names(
    state_dict: Mapping[str, Tensor], *, config_text: str = "", input_format: str | None = None
) -> dict[str, Tensor]:
    """The same network in torchvision's layout: names, order of colours, order of classes.

    Args:
        config_text: the configuration in the file.
        input_format: channel order of the first convolution, `rgb` or `bgr`; None takes it from the configuration, or
            else RGB.

    Raises:
        ModelStoreError: the weights are from mmdetection 1, which had the background as the first class and boxes one
            pixel larger.
    """
    if any(key.startswith("bbox_head.") for key in state_dict):
        raise ModelStoreError(
            "expected a checkpoint of mmdetection 2 or 3, got one of mmdetection 1, whose boxes are a pixel larger: "
            "convert it with mmdetection's tools/model_converters/upgrade_model_version.py"
        )
    is_bgr = (input_format or _facts(config_text).input_format or "rgb") == "bgr"
    convs = {match[1] for key in state_dict if (match := re.match(r"roi_head\.bbox_head\.shared_convs\.(\d+)\.", key))}
    kept = {key: one for key, one in state_dict.items() if not key.startswith("data_preprocessor.")}
    renamed = {_torchvision_name(key, convs=len(convs)): tensor for key, tensor in kept.items()}
    return {key: torchvision_order(key, tensor, is_bgr=is_bgr) for key, tensor in renamed.items()}


def _torchvision_name(key: str, *, convs: int) -> str:
    if match := _HIDDEN.match(key):
        # After convolutions there are a flatten and one hidden layer; otherwise there are two hidden layers.
        layer = str(convs + 1 + int(match[1])) if convs else f"fc{6 + int(match[1])}"
        return f"roi_heads.box_head.{layer}.{key[match.end() :]}"
    for pattern, replacement in _RENAMED:
        key = pattern.sub(replacement, key)
    return _GROUP_NORM.sub(r"\1bn\2.", key)


def mmdetection_findings(
    state_dict: Mapping[str, Tensor], *, config_text: str = "", input_format: str | None = None
) -> Findings:
    """Identify the network of an unconverted state dict, from the configuration beside it where possible, else by
    mmdetection's base configuration.

    Raises:
        ModelStoreError: the network is not supported.
    """
    found = inferred(with_torchvision_names(state_dict, config_text=config_text, input_format=input_format))
    found.family = "mmdetection"
    found.notes.clear()  # torchvision's norms have it
    facts = _facts(config_text)
    is_caffe = (input_format or facts.input_format or "rgb") == "bgr"
    has_bottlenecks = re.match(r"(wide_)?resne[x]?t(50|101|152)_", found.get("backbone.name")) is not None
    mean, std = (_CAFFE_MEAN[::-1], _CAFFE_STD) if is_caffe else (_MEAN, _STD)
    found.assume("transform", mean=tuple(one / 255 for one in mean), std=tuple(one / 255 for one in std))
    if has_bottlenecks:
        found.assume("backbone", stride_in_1x1=is_caffe)
    found.assume("anchors", style="mmdetection")
    found.assume("roi", sampling_ratio=0, aligned=True)
    if found.tables["architecture"] == "mask_rcnn":
        found.assume("masks", style="detectron2")
    facts.tell(found, has_bottlenecks=has_bottlenecks)
    if not facts.config:
        found.notes.append(
            "the file has no configuration: a network with style='caffe' or to_rgb=False, which reads BGR, needs "
            "--input-format bgr"
        )
    return found


class _Facts:
    """The facts in a configuration: the dicts and lists that it assigns."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @property
    def pixels(self) -> Mapping[str, Any]:
        """Mean, std and channel order, under the keys of either release."""
        for found in (self.at("model.data_preprocessor"), self.at("img_norm_cfg")):
            if isinstance(found, Mapping) and found:
                return found
        return next((one for one in _dicts(self.config) if one.get("type") == "Normalize"), {})

    @property
    def input_format(self) -> str | None:
        """`rgb` or `bgr`, None if it does not say."""
        to_rgb = self.pixels.get("bgr_to_rgb", self.pixels.get("to_rgb"))
        if isinstance(to_rgb, bool):
            return "rgb" if to_rgb else "bgr"
        return None

    def at(self, path: str) -> Any:
        """The value under a dotted name, None if there is none."""
        value: Any = self.config
        for key in path.split("."):
            if not isinstance(value, Mapping):
                return None
            value = value.get(key)
        return value

    def tell(self, found: Findings, *, has_bottlenecks: bool) -> None:
        """Record everything that it says."""
        mean, std = _numbers(self.pixels.get("mean"), 3), _numbers(self.pixels.get("std"), 3)
        if mean and std:
            if self.input_format == "bgr":
                mean, std = mean[::-1], std[::-1]
            found.tell("transform", _CONFIG, mean=tuple(m / 255 for m in mean), std=tuple(s / 255 for s in std))
        style = self.at("model.backbone.style")
        if has_bottlenecks and style in ("caffe", "pytorch"):
            found.tell("backbone", _CONFIG, stride_in_1x1=style == "caffe")
        self._tell_anchors(found)
        scale = _numbers(self._scale(), 2)
        if scale:
            found.tell("transform", _CONFIG, min_size=int(min(scale)), max_size=int(max(scale)))
        stds = _numbers(self.at("model.roi_head.bbox_head.bbox_coder.target_stds"), 4)
        if stds and min(stds) > 0:
            found.tell("roi", _CONFIG, box_weights=tuple(round(1 / one, 6) for one in stds))
        for path, table, key, kinds in _PLAIN_FACTS:
            value = self.at(path)
            if isinstance(value, kinds) and not isinstance(value, bool):
                found.tell(table, _CONFIG, **{key: value})

    def _tell_anchors(self, found: Findings) -> None:
        generator = self.at("model.rpn_head.anchor_generator") or {}
        if not isinstance(generator, Mapping):
            return
        scales, ratios, strides = (_numbers(generator.get(key)) for key in ("scales", "ratios", "strides"))
        if scales and ratios and strides and not generator.get("center_offset"):
            sizes = tuple(tuple(stride * scale for scale in scales) for stride in strides)
            found.tell("anchors", _CONFIG, sizes=sizes, aspect_ratios=ratios)
            found.doubts.pop("anchors.sizes", None)

    def _scale(self) -> Any:
        """The image size used for testing."""
        for pipeline in (self.config.get("test_pipeline"), self.at("data.test.pipeline")):
            for step in _dicts(pipeline):
                for key in ("img_scale", "scale"):
                    if step.get("type") in ("MultiScaleFlipAug", "Resize") and key in step:
                        return step[key]
        return None


_PLAIN_FACTS: tuple[tuple[str, str, str, Any], ...] = (
    ("model.test_cfg.rpn.nms_pre", "rpn", "pre_nms_top_n_test", int),
    ("model.test_cfg.rpn.max_per_img", "rpn", "post_nms_top_n_test", int),
    ("model.test_cfg.rpn.nms.iou_threshold", "rpn", "nms_thresh", float),
    ("model.test_cfg.rcnn.score_thr", "detections", "score_thresh", float),
    ("model.test_cfg.rcnn.nms.iou_threshold", "detections", "nms_thresh", float),
    ("model.test_cfg.rcnn.max_per_img", "detections", "detections_per_img", int),
    ("model.roi_head.bbox_roi_extractor.roi_layer.sampling_ratio", "roi", "sampling_ratio", int),
)


def _numbers(value: Any, length: int | None = None) -> tuple[float, ...] | None:
    if not isinstance(value, list | tuple) or (length is not None and len(value) != length) or not value:
        return None
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in value):
        return None
    return tuple(float(one) for one in value)


def _dicts(value: Any) -> Iterator[Mapping[str, Any]]:
    """All dicts in nested dicts and lists, outermost first."""
    waiting, seen = [value], set[int]()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:  # names may refer to the same list many times
            continue
        seen.add(id(one))
        if isinstance(one, Mapping):
            yield one
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one


def _facts(config_text: str) -> _Facts:
    if not config_text or len(config_text) > _LONGEST_TEXT:
        return _Facts({})
    config: dict[str, Any] = {}
    try:
        for statement in ast.parse(config_text).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                config[statement.targets[0].id] = _literal(statement.value, config)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _Facts({})
    return _Facts(config)


def _literal(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression of literals, `dict(…)` and names assigned before; None for any other expression."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item, names) for item in items]
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return {str(key.value): _literal(value, names) for key, value in pairs if isinstance(key, ast.Constant)}
        case ast.Call(func=ast.Name(id="dict"), keywords=keywords):
            return {one.arg: _literal(one.value, names) for one in keywords if one.arg is not None}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Name(id=name):
            return names.get(name)
        case _:
            return None
