"""Backbones: a trunk and its feature pyramid, if it has one, with torchvision's attribute names (`body`, `fpn`). Knows
convolutions and strides; knows nothing of boxes.

Shapes: N images, C channels of the pictures (3 for RGB), H x W their size.
"""

from __future__ import annotations

import difflib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import mobilenet, resnet, vgg
from torchvision.models._api import get_model, list_models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelP6P7,
)

from service.errors import ModelStoreError
from service.modeling.config import BackboneConfig, Norm

NormLayer = Callable[[int], nn.Module]
_GROUPS = 32
"""Number of groups in group norms (Wu and He 2018), as in detectron2."""
_FAMILIES_WITH_FEATURES = ("mobilenet", "vgg", "squeezenet", "alexnet", "densenet", "efficientnet", "convnext")
"""The families that are fine-tuned most often come first."""


class Backbone(NamedTuple):
    """A trunk with its pyramid, if any, and where the RoI heads may pool.

    Attributes:
        module: (N, C, H, W) -> feature maps by name, finest first.
        pooled_strides: stride of each map that RoIs are pooled from, by name, finest first.
        strides: stride of each map that the RPN sees, finest first.
        out_channels: of every map.
        res5: the trunk's last stage, if it is the box head: (K, out_channels, S, S) -> (K, 2 * out_channels, S', S')
            with S' = S / 2 rounded up.
    """

    module: nn.Module
    pooled_strides: dict[str, int]
    strides: tuple[int, ...]
    out_channels: int
    res5: nn.Module | None = None


class SingleMap(nn.Module):
    """A trunk without a pyramid.

    Args:
        trunk: its parts in the order in which they run.
        last: name of the part whose output is the map; later parts are left out.
    """

    def __init__(self, trunk: nn.Module, *, last: str) -> None:
        super().__init__()
        self.body = IntermediateLayerGetter(trunk, return_layers={last: "0"})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) -> the one map, as `0`."""
        return self.body(x)  # type: ignore[no-any-return]  # nn.Module's call


class NarrowResNet18(nn.Module):
    """ResNet-18 (He et al. 2015) with `width` channels in its first stage instead of 64, and no classifier.

    The parts are named as in `torchvision.models.resnet18`.
    """

    def __init__(self, *, width: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(width, width, stride=1, norm_layer=norm_layer)
        self.layer2 = _stage(width, width * 2, stride=2, norm_layer=norm_layer)
        self.layer3 = _stage(width * 2, width * 4, stride=2, norm_layer=norm_layer)
        self.layer4 = _stage(width * 4, width * 8, stride=2, norm_layer=norm_layer)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 8 * width, H / 32, W / 32)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[no-any-return]  # nn.Module's call


class TimmWithFPN(nn.Module):
    """A timm trunk with a feature pyramid over some of its maps.

    Args:
        trunk: (N, C, H, W) -> a list of feature maps.
        channels_last: whether these are (N, H', W', C), not (N, C, H', W').
        in_channels: of each map to use, by its index in that list, finest first.
        out_channels: of every map of the pyramid.
        norm_layer: applied after the pyramid's convolutions, which then have no bias.
    """

    def __init__(
        self,
        trunk: nn.Module,
        *,
        channels_last: bool,
        in_channels: Mapping[int, int],
        out_channels: int,
        norm_layer: NormLayer | None,
    ) -> None:
        super().__init__()
        self.body = trunk
        self.channels_last = channels_last
        self.places = tuple(in_channels)
        self.fpn = FeaturePyramidNetwork(
            list(in_channels.values()), out_channels, extra_blocks=EverySecondCell(), norm_layer=norm_layer
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) -> the maps from `0`, finest first, and an extra one, `pool`."""
        maps = self.body(x)
        if self.channels_last:
            maps = [one.permute(0, 3, 1, 2) for one in maps]
        return self.fpn(OrderedDict((str(level), maps[place]) for level, place in enumerate(self.places)))  # type: ignore[no-any-return]  # nn.Module's call


def build_backbone(config: BackboneConfig, *, in_channels: int = 3) -> Backbone:
    """Build the configured trunk, with its pyramid if any, with random weights.

    Args:
        in_channels: of the pictures.

    Raises:
        ModelStoreError: torchvision or timm has no such trunk, the trunk returns no feature maps, or timm is not
            installed.
    """
    backbone = _build_three_channels(config)
    if in_channels != 3:
        _read_channels(backbone.module, in_channels)
    return backbone


def _build_three_channels(config: BackboneConfig) -> Backbone:
    if config.timm_model is not None:
        return _timm_fpn(config.timm_model, config)
    if config.torchvision_model is not None:
        return _torchvision_features(config.torchvision_model, config)
    if config.name == "vgg16":
        return _vgg16()
    trunk_norm = norm_layer(config.norm, eps=config.norm_eps)
    if config.name == "mobilenet_v3_large_fpn":
        return _mobilenet_fpn(trunk_norm, config)
    if config.width is not None:
        return _from_resnet(NarrowResNet18(width=config.width, norm_layer=trunk_norm), 8 * config.width, config)
    trunk = _resnet(config.name.rpartition("_")[0], trunk_norm)
    if config.stride_in_1x1:
        _stride_in_1x1(trunk)
    return _from_resnet(trunk, trunk.inplanes, config)


def _resnet(name: str, trunk_norm: NormLayer) -> resnet.ResNet:
    if name == "resnext101_32x4d":  # mmdetection's; torchvision has no builder for it
        layers = [3, 4, 23, 3]
        return resnet.ResNet(resnet.Bottleneck, layers, groups=32, width_per_group=4, norm_layer=trunk_norm)
    trunk: resnet.ResNet = getattr(resnet, name)(weights=None, norm_layer=trunk_norm)
    return trunk


def _read_channels(module: nn.Module, in_channels: int) -> None:
    """Replace the network's first convolution by one with another number of input channels."""
    name, first = next((name, one) for name, one in module.named_modules() if isinstance(one, nn.Conv2d))
    parent, _, child = name.rpartition(".")
    other = nn.Conv2d(
        in_channels,
        first.out_channels,
        kernel_size=first.kernel_size,  # type: ignore[arg-type]  # a pair, as torch keeps it
        stride=first.stride,  # type: ignore[arg-type]  # likewise
        padding=first.padding,  # type: ignore[arg-type]  # likewise
        bias=first.bias is not None,
    )
    _initialise(other)
    setattr(module.get_submodule(parent), child, other)


def norm_layer(norm: Norm, *, eps: float = 1e-5) -> NormLayer:
    """The configured norm, as a function of the number of channels."""
    if norm == "group_norm":
        return partial(nn.GroupNorm, _GROUPS, eps=eps)
    return partial(FrozenBatchNorm2d if norm == "frozen_batch_norm" else nn.BatchNorm2d, eps=eps)


def _from_resnet(trunk: nn.Module, last_channels: int, config: BackboneConfig) -> Backbone:
    """The feature maps of a ResNet whose last stage has `last_channels` channels."""
    if config.has_res5_head:
        res5 = trunk.get_submodule("layer4")
        module: nn.Module = SingleMap(trunk, last="layer3")
        return Backbone(module, {"0": 16}, strides=(16,), out_channels=last_channels // 2, res5=res5)
    if config.name.endswith("_c5"):
        return Backbone(SingleMap(trunk, last="layer4"), {"0": 32}, strides=(32,), out_channels=last_channels)
    stages = config.returned_layers
    # A stage halves the map and doubles the channels.
    channels = [last_channels >> (4 - stage) for stage in stages]
    module = BackboneWithFPN(
        trunk,
        return_layers={f"layer{stage}": str(level) for level, stage in enumerate(stages)},
        in_channels_list=channels,
        out_channels=config.out_channels,
        extra_blocks=_extra_blocks(config, channels[-1]),
        norm_layer=config.fpn_norm and norm_layer(config.fpn_norm),
    )
    if config.extra_blocks == "none":
        module.fpn.extra_blocks = None  # torchvision replaces None by its own default
    pooled = {str(level): 2 << stage for level, stage in enumerate(stages)}
    coarsest = 2 << stages[-1]
    extra = {"pool": (2 * coarsest,), "none": ()}.get(config.extra_blocks, (2 * coarsest, 4 * coarsest))
    return Backbone(module, pooled, strides=(*pooled.values(), *extra), out_channels=config.out_channels)


class EverySecondCell(ExtraFPNBlock):
    """torchvision's `LastLevelMaxPool`: the coarsest map is every second cell of the one before."""

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """See `ExtraFPNBlock`."""
        last = results[-1]
        if torch.compiler.is_compiling():
            # By indices, since torch 2.11 compiles pooling for an even or for an odd number of cells, not for both:
            # pictures of other sizes would run uncompiled.
            rows, columns = (torch.arange(0, side, 2, device=last.device) for side in last.shape[2:])
            coarsest = last.index_select(2, rows).index_select(3, columns)
        else:
            coarsest = functional.max_pool2d(last, kernel_size=1, stride=2)
        return [*results, coarsest], [*names, "pool"]


def _extra_blocks(config: BackboneConfig, trunk_channels: int) -> ExtraFPNBlock | None:
    """The coarser maps on top of the pyramid."""
    match config.extra_blocks:
        case "pool":
            return EverySecondCell()
        case "none":
            return None
        case "p6p7":
            return LastLevelP6P7(config.out_channels, config.out_channels)
        case "p6p7_on_c5":
            if trunk_channels == config.out_channels:
                raise ModelStoreError(
                    f"expected out_channels other than the trunk's {trunk_channels} with extra_blocks = 'p6p7_on_c5': "
                    "torchvision tells P5 from C5 by them"
                )
            return LastLevelP6P7(trunk_channels, config.out_channels)


def torchvision_features(model: str) -> nn.Sequential:
    """The `.features` of one of torchvision's classifiers, with random weights.

    Raises:
        ModelStoreError: there is no such classifier, or it has no `.features` that return a map.
    """
    if model not in models_with_features():
        close = difflib.get_close_matches(model, models_with_features(), n=3)
        hint = (
            f"; did you mean one of: {', '.join(close)}?" if close else f"; known: {', '.join(models_with_features())}"
        )
        raise ModelStoreError(f"torchvision has no classifier {model!r} whose features are one map{hint}")
    features = get_model(model, weights=None).features
    assert isinstance(features, nn.Sequential)
    return features


@cache
def models_with_features() -> tuple[str, ...]:
    """Names of torchvision's classifiers that compute their feature map in a module called `features`."""
    known = list_models(module=torchvision.models)
    return tuple(name for family in _FAMILIES_WITH_FEATURES for name in known if name.startswith(family))


@cache
def _channels_and_stride(model: str, stop: int | None) -> tuple[int, int]:
    """Channels and stride of the map after the first `stop` parts of `torchvision_features`, computed from shapes
    alone.
    """
    with torch.device("meta"):
        shape = torchvision_features(model)[:stop].eval()(torch.zeros(1, 3, 1024, 1024)).shape
    # Pooling without padding loses a cell or two, which does not change the stride.
    return shape[1], 1 << round(math.log2(1024 / shape[2]))


def _torchvision_features(model: str, config: BackboneConfig) -> Backbone:
    trunk = torchvision_features(model)[: config.features_stop]
    if not len(trunk):
        raise ModelStoreError(
            f"expected features_stop to leave some of the parts of {model}, got {config.features_stop}"
        )
    if config.norm == "frozen_batch_norm":
        _freeze_norms(trunk)
    channels, stride = _channels_and_stride(model, config.features_stop)
    module = SingleMap(trunk, last=[name for name, _ in trunk.named_children()][-1])
    return Backbone(module, {"0": stride}, strides=(stride,), out_channels=channels)


def _freeze_norms(trunk: nn.Module) -> None:
    """Replace batch norms by frozen ones, which never update their statistics."""
    for parent in list(trunk.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm) is nn.BatchNorm2d:
                setattr(parent, name, FrozenBatchNorm2d(norm.num_features, eps=norm.eps))


def _mobilenet_fpn(trunk_norm: NormLayer, config: BackboneConfig) -> Backbone:
    trunk = mobilenet.mobilenet_v3_large(weights=None, norm_layer=trunk_norm).features
    strided = [index for index, block in enumerate(trunk) if getattr(block, "_is_cn", False)]
    stages = [strided[-1], len(trunk) - 1]
    module = BackboneWithFPN(
        trunk,
        return_layers={str(index): str(level) for level, index in enumerate(stages)},
        in_channels_list=[trunk[index].out_channels for index in stages],
        out_channels=config.out_channels,
        extra_blocks=EverySecondCell(),
        norm_layer=config.fpn_norm and norm_layer(config.fpn_norm),
    )
    # Both maps have stride 32, so torchvision's level mapper sends every box to the first.
    return Backbone(module, {"0": 32}, strides=(32, 32, 64), out_channels=config.out_channels)


def _timm_fpn(model: str, config: BackboneConfig) -> Backbone:
    trunk = _timm_trunk(model)
    if config.norm == "frozen_batch_norm":
        from timm.layers import freeze_batch_norm_2d  # type: ignore[attr-defined]  # timm has no list of exports

        trunk = freeze_batch_norm_2d(trunk)  # type: ignore[no-untyped-call]
    # A pyramid begins with stride 4 (FPN, section 3); of several maps with the same stride, the deepest is used.
    place_of = {stride: place for place, stride in enumerate(trunk.feature_info.reduction()) if stride >= 4}
    channels = trunk.feature_info.channels()
    strides = tuple(place_of)
    # Equation (1) of the FPN paper assumes that level k has stride 2^k; with other strides it would choose the wrong
    # map.
    if not strides or strides[0].bit_count() != 1 or any(2 * one != other for one, other in pairwise(strides)):
        raise ModelStoreError(
            "expected a model of timm whose strides double from map to map, from a power of two on, as 4, 8, 16, 32; "
            f"{model} has {', '.join(map(str, strides)) or 'none from 4 on'}"
        )
    module = TimmWithFPN(
        trunk,
        channels_last=getattr(trunk, "output_fmt", "NCHW") == "NHWC",
        in_channels={place: channels[place] for place in place_of.values()},
        out_channels=config.out_channels,
        norm_layer=norm_layer(config.fpn_norm) if config.fpn_norm else None,
    )
    pooled = {str(level): stride for level, stride in enumerate(strides)}
    return Backbone(module, pooled, strides=(*strides, 2 * strides[-1]), out_channels=config.out_channels)


def _timm_trunk(model: str) -> Any:
    """A timm model that returns its feature maps, with random weights."""
    try:
        import timm
    except ImportError:
        raise ModelStoreError(f"backbone timm/{model} needs the package timm: pip install timm") from None
    if not timm.is_model(model):
        close = ", ".join(difflib.get_close_matches(model, timm.list_models(), n=3))
        raise ModelStoreError(f"timm has no model {model!r}" + (f"; did you mean one of: {close}?" if close else ""))
    problem: Exception | None = None
    # Transformers accept only one image size by default; the option to change that depends on the family.
    words: tuple[dict[str, Any], ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})
    for any_size in words:
        try:
            return timm.create_model(model, pretrained=False, features_only=True, **any_size)
        except (RuntimeError, AttributeError, TypeError) as error:
            problem = error
    raise ModelStoreError(f"timm's {model} gives no feature maps: {problem}") from problem


def _vgg16() -> Backbone:
    # torchvision's complete VGG-16 would allocate a classifier of 120 million weights, only to discard it.
    trunk = vgg.make_layers(vgg.cfgs["D"])
    _initialise(trunk)
    # 28 is conv5_3, 29 its ReLU, and 30 the last pooling, which RoI pooling replaces.
    return Backbone(SingleMap(trunk, last="29"), {"0": 16}, strides=(16,), out_channels=512)


def _initialise(trunk: nn.Module) -> None:
    """Initialise convolutions like torchvision's trunks (He et al. 2015, "Delving deep into rectifiers")."""
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _stage(in_channels: int, channels: int, *, stride: int, norm_layer: NormLayer) -> nn.Sequential:
    downsample = None
    if stride != 1 or in_channels != channels:
        downsample = nn.Sequential(resnet.conv1x1(in_channels, channels, stride), norm_layer(channels))
    return nn.Sequential(
        resnet.BasicBlock(in_channels, channels, stride, downsample, norm_layer=norm_layer),
        resnet.BasicBlock(channels, channels, norm_layer=norm_layer),
    )


def _stride_in_1x1(trunk: nn.Module) -> None:
    """Move the stride of each strided bottleneck from its 3 x 3 to its first 1 x 1 convolution (He et al. 2015)."""
    for module in trunk.modules():
        if isinstance(module, resnet.Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
