"""Convert detectors from detectron2's layout to torchvision's: Faster and Mask R-CNN on a ResNet, with a pyramid (FPN)
or on its fourth stage (C4).

Differences besides the names: the first convolution reads BGR, in 0 to 255; the background is the last class, not the
first, and has no box deltas and no mask; bottlenecks stride in their first convolution; anchors are not rounded; RoI
Align shifts by half a pixel and adapts its number of samples; Pillow resizes pictures; masks are sampled at the centers
of pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from service.errors import ModelStoreError
from service.model_store.findings import FILE, Findings
from service.model_store.torchvision_layout import inferred

_TRUNKS = ("backbone.bottom_up.", "backbone.res2.")
"""With a pyramid the trunk is a part of the backbone; with C4 it is the whole backbone."""
# Constants of the network that some releases store with the weights.
_CELL_ANCHORS = re.compile(r"proposal_generator\.anchor_generator\.cell_anchors\.(\d+)")
_CONSTANTS = re.compile(rf"pixel_mean|pixel_std|{_CELL_ANCHORS.pattern}")
_PIXEL_MEAN_BGR = (103.530, 116.280, 123.675)
# For models trained from torchvision's or ResNeXt's weights; those from MSRA's weights and those with group norm have
# 1.
_PIXEL_STD_BGR = (57.375, 57.120, 58.395)

_RENAMED = (
    (re.compile(r"backbone\.(?:bottom_up\.)?stem\.conv1\.norm\."), r"backbone.body.bn1."),
    (re.compile(r"backbone\.(?:bottom_up\.)?stem\."), r"backbone.body."),
    (re.compile(r"backbone\.top_block\."), r"backbone.fpn.extra_blocks."),
    (re.compile(r"(res\d\.\d+)\.conv(\d)\.norm\."), r"\1.bn\2."),
    (re.compile(r"(res\d\.\d+)\.shortcut\.norm\."), r"\1.downsample.1."),
    (re.compile(r"(res\d\.\d+)\.shortcut\."), r"\1.downsample.0."),
    (re.compile(r"proposal_generator\.rpn_head\.conv\.conv(\d)\."), r"rpn.head.conv.\1.0."),
    (re.compile(r"proposal_generator\.rpn_head\.conv\."), r"rpn.head.conv.0.0."),
    (re.compile(r"proposal_generator\.rpn_head\.objectness_logits\."), r"rpn.head.cls_logits."),
    (re.compile(r"proposal_generator\.rpn_head\.anchor_deltas\."), r"rpn.head.bbox_pred."),
    (re.compile(r"roi_heads\.mask_head\.deconv\."), r"roi_heads.mask_predictor.conv5_mask."),
    (re.compile(r"roi_heads\.mask_head\.predictor\."), r"roi_heads.mask_predictor.mask_fcn_logits."),
)
# detectron2 counts stages as the paper does, from 2; torchvision's layers and pyramid levels begin with 1 and 0.
_NUMBERED = (
    (re.compile(r"backbone\.(?:bottom_up\.)?res(\d)\."), "backbone.body.layer{}.", 1),
    (re.compile(r"roi_heads\.res(\d)\."), "roi_heads.box_head.layer{}.", 1),
    (re.compile(r"roi_heads\.mask_head\.mask_fcn(\d)\.norm\."), "roi_heads.mask_head.{}.1.", 1),
    (re.compile(r"roi_heads\.mask_head\.mask_fcn(\d)\."), "roi_heads.mask_head.{}.0.", 1),
    (re.compile(r"roi_heads\.box_head\.conv(\d)\.norm\."), "roi_heads.box_head.{}.1.", 1),
    (re.compile(r"roi_heads\.box_head\.conv(\d)\."), "roi_heads.box_head.{}.0.", 1),
)
_PYRAMID = re.compile(r"backbone\.fpn_(lateral|output)(\d)\.(norm\.)?")
_BLOCKS = {"lateral": "inner_blocks", "output": "layer_blocks"}


def is_detectron2(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names follow detectron2."""
    return any(key.startswith(_TRUNKS) for key in state_dict)


def with_torchvision_names(state_dict: Mapping[str, Tensor], *, input_format: str | None = None) -> dict[str, Tensor]:
    """The same network in torchvision's layout: names, order of colours, order of classes.

    Names that do not occur in detectron2's Faster and Mask R-CNN are kept, and `load_into` reports them as surplus.

    Args:
        input_format: channel order of the first convolution, `rgb` or `bgr`; None takes it from the file, or else BGR.
    """
    is_bgr = (input_format or _input_format(state_dict)) == "bgr"
    name_of = _Names(state_dict)
    renamed = {name_of(key): tensor for key, tensor in state_dict.items() if not _CONSTANTS.fullmatch(key)}
    return {key: torchvision_order(key, tensor, is_bgr=is_bgr) for key, tensor in renamed.items()}


def detectron2_findings(state_dict: Mapping[str, Tensor], *, input_format: str | None = None) -> Findings:
    """Identify the network of an unconverted state dict, from its buffers where possible, else by the model zoo's
    defaults.

    Raises:
        ModelStoreError: the network is not supported.
    """
    if "backbone.res5.0.conv1.weight" in state_dict:
        raise ModelStoreError("expected FPN or C4, got a detectron2 network on one map of its last stage (DC5)")
    found = inferred(with_torchvision_names(state_dict, input_format=input_format))
    found.family = "detectron2"
    found.notes.clear()  # torchvision's norms have it
    _find_pixels(found, state_dict, input_format)
    found.assume("anchors", style="detectron2")
    _find_anchors(found, state_dict)
    is_c4 = found.get("backbone.name").endswith("_c4")
    found.assume("transform", style="detectron2", **({"size_divisible": 1} if is_c4 else {}))
    if found.tables["architecture"] == "mask_rcnn":
        found.assume("masks", style="detectron2")
    found.assume("rpn", **({"post_nms_top_n_test": 1000} if is_c4 else {"post_nms_top_n_train": 1000}))
    found.assume("roi", sampling_ratio=0, aligned=True, box_weights=(10.0, 10.0, 5.0, 5.0), batch_size_per_image=512)
    return found


def _find_pixels(found: Findings, weights: Mapping[str, Tensor], input_format: str | None) -> None:
    """Find mean and std, as RGB in 0 to 1, and where the bottlenecks stride, which can be inferred from them."""
    given_format = input_format or _input_format(weights)
    name, norm = found.get("backbone.name"), found.get("backbone.norm")
    is_plain = name.startswith("resnet") and norm != "group_norm"
    std_known, mean_known = "pixel_std" in weights, "pixel_mean" in weights
    from_torchvision = given_format == "rgb" or name.startswith(("resnext", "wide"))
    mean = _numbers(weights, "pixel_mean", _PIXEL_MEAN_BGR if given_format == "bgr" else _PIXEL_MEAN_BGR[::-1])
    usual_std = _PIXEL_STD_BGR if from_torchvision else (1.0, 1.0, 1.0)
    std = _numbers(weights, "pixel_std", usual_std if given_format == "bgr" else usual_std[::-1])
    if len(mean) == 3 and given_format == "bgr":
        mean, std = mean[::-1], std[::-1]
    if found.get("transform.channels") in (None, "rgb") or mean_known:
        found.assume("transform", mean=tuple(one / 255 for one in mean), std=tuple(one / 255 for one in std))
        found.doubts.pop("transform.mean", None)
        found.doubts.pop("transform.std", None)
    found.told |= {
        key: f"{FILE}: {buffer}"
        for key, buffer, known in (
            ("transform.mean", "pixel_mean", mean_known),
            ("transform.std", "pixel_std", std_known),
        )
        if known
    }
    if re.match(r"resnet(50|101|152)_", name):
        # MSRA's weights, which have the std folded in, are the ones that stride in the 1 x 1 convolution.
        found.assume("backbone", stride_in_1x1=is_plain and not from_torchvision and max(std) <= 1.5)


def _numbers(weights: Mapping[str, Tensor], key: str, usual: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(weights[key].flatten().tolist()) if key in weights else usual


def _input_format(weights: Mapping[str, Tensor]) -> str:
    """The channel order: RGB if the mean decreases from the first channel to the last."""
    mean = weights.get("pixel_mean")
    is_rgb = mean is not None and mean.numel() == 3 and mean.flatten()[0] > mean.flatten()[2]
    return "rgb" if is_rgb else "bgr"


def _find_anchors(found: Findings, weights: Mapping[str, Tensor]) -> None:
    """Sizes and ratios from the anchors at the origin, which older releases stored."""
    cells = {int(match[1]): one for key, one in weights.items() if (match := _CELL_ANCHORS.fullmatch(key))}
    levels = [cells[level] for level in sorted(cells)]
    grids = [_sizes_and_ratios(one) for one in levels]
    if not grids or sorted(cells) != list(range(len(cells))) or any(grid is None for grid in grids):
        return
    sizes = tuple(grid[0] for grid in grids if grid)
    ratios = tuple(grid[1] for grid in grids if grid)
    same = len(set(ratios)) == 1
    found.tell("anchors", f"{FILE}: cell_anchors", sizes=sizes, aspect_ratios=ratios[0] if same else ratios)
    found.doubts.pop("anchors.sizes", None)


def _sizes_and_ratios(cells: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Sizes and ratios of (A, 4) anchors ordered by size, then ratio; None if they are not such a grid."""
    if cells.ndim != 2 or cells.shape[1:] != (4,) or not 0 < len(cells) <= _MOST_ANCHORS:
        return None
    widths, heights = (cells[:, 2] - cells[:, 0]).double(), (cells[:, 3] - cells[:, 1]).double()
    if not bool((widths > 0).all() and (heights > 0).all()):
        return None
    sides = [round(side, 3) for side in (widths * heights).sqrt().tolist()]
    ratios = [round(ratio, 4) for ratio in (heights / widths).tolist()]
    sizes, ratios_of_one = tuple(dict.fromkeys(sides)), tuple(dict.fromkeys(ratios))
    is_grid = list(zip(sides, ratios, strict=True)) == [(side, ratio) for side in sizes for ratio in ratios_of_one]
    return (sizes, ratios_of_one) if is_grid else None


_MOST_ANCHORS = 1024


class _Names:
    """Translates the names of one network to torchvision's layout. Some depend on the number of levels and layers."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        levels = [int(match[2]) for key in state_dict if (match := _PYRAMID.match(key))]
        self.finest = min(levels, default=2)
        convs = {match[1] for key in state_dict if (match := re.match(r"roi_heads\.box_head\.conv(\d)\.", key))}
        # After convolutions there are a flatten and one hidden layer; otherwise there are two hidden layers.
        self.hidden = {"fc1": str(len(convs) + 1) if convs else "fc6", "fc2": "fc7"}

    def __call__(self, key: str) -> str:
        if match := _PYRAMID.match(key):
            level, part = int(match[2]) - self.finest, 1 if match[3] else 0
            return f"backbone.fpn.{_BLOCKS[match[1]]}.{level}.{part}.{key[match.end() :]}"
        if match := re.match(r"roi_heads\.box_head\.(fc[12])\.", key):
            return f"roi_heads.box_head.{self.hidden[match[1]]}.{key[match.end() :]}"
        for pattern, replacement in _RENAMED:
            key = pattern.sub(replacement, key)
        for pattern, template, first in _NUMBERED:
            if match := pattern.match(key):
                key = template.format(int(match[1]) - first) + key[match.end() :]
        return key


def torchvision_order(key: str, tensor: Tensor, *, is_bgr: bool) -> Tensor:
    """Convert a weight, given by torchvision's name, to RGB order and to the background as the first class instead of
    the last.

    Args:
        is_bgr: whether the first convolution reads BGR.
    """
    if key == "backbone.body.conv1.weight" and is_bgr and tensor.ndim == 4 and tensor.shape[1] == 3:
        return tensor.flip(1)
    if key.startswith("roi_heads.box_predictor.cls_score."):
        return tensor.roll(1, dims=0)
    if key.startswith("roi_heads.box_predictor.bbox_pred."):
        # The background's box and mask are never used.
        return _with_rows_in_front(tensor, 4) if len(tensor) > 4 else tensor
    if key.startswith("roi_heads.mask_predictor.mask_fcn_logits."):
        return _with_rows_in_front(tensor, 1) if len(tensor) > 1 else tensor
    return tensor


def _with_rows_in_front(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor.new_zeros(rows, *tensor.shape[1:]), tensor])
