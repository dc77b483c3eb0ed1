import sys

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torchvision.models import resnet, vgg
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from service.errors import ModelStoreError
from service.modeling.backbone import build_backbone
from service.modeling.config import BackboneConfig


def strided_bottleneck(*, stride_in_1x1: bool) -> Bottleneck:
    """The first block of ResNet-50's second stage, which halves the map."""
    module = build_backbone(BackboneConfig(name="resnet50_fpn", stride_in_1x1=stride_in_1x1)).module
    block = module.get_submodule("body.layer2.0")
    assert isinstance(block, Bottleneck)
    return block


def test_bottlenecks_stride_where_the_configuration_says() -> None:
    as_torchvision, as_detectron2 = (strided_bottleneck(stride_in_1x1=flag) for flag in (False, True))
    assert (as_torchvision.conv1.stride, as_torchvision.conv2.stride) == ((1, 1), (2, 2))
    assert (as_detectron2.conv1.stride, as_detectron2.conv2.stride) == ((2, 2), (1, 1))
    assert as_detectron2(torch.zeros(1, 256, 8, 8)).shape == (1, 512, 4, 4)


def test_only_bottlenecks_can_be_told_where_to_stride() -> None:
    with pytest.raises(ValidationError, match=r"'stride_in_1x1' is for ResNets of 50 and more layers"):
        BackboneConfig(name="resnet18_fpn", stride_in_1x1=True)


def test_trunk_and_pyramid_have_the_norms_that_the_configuration_names() -> None:
    config = BackboneConfig(name="narrow_resnet18_fpn", width=8, norm_eps=0.5, fpn_norm="batch_norm")
    module = build_backbone(config).module
    trunk = [norm for norm in module.get_submodule("body").modules() if isinstance(norm, FrozenBatchNorm2d)]
    pyramid = [norm for norm in module.get_submodule("fpn").modules() if isinstance(norm, nn.BatchNorm2d)]
    # ResNet-18: one norm in the stem, four in each of four stages, three in shortcuts; a pyramid has two a level.
    assert [norm.eps for norm in trunk] == [0.5] * 20
    assert [norm.eps for norm in pyramid] == [1e-5] * 8


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_c4_is_torchvisions_trunk_up_to_conv4_with_res5_apart(stride_in_1x1: bool) -> None:
    backbone = build_backbone(BackboneConfig(name="resnet50_c4", stride_in_1x1=stride_in_1x1))
    theirs = resnet.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    whole = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    body = {key: value for key, value in whole.items() if not key.startswith("layer4.")}
    backbone.module.get_submodule("body").load_state_dict(body, strict=True)
    assert backbone.res5 is not None
    backbone.res5.load_state_dict({key[7:]: whole[key] for key in whole.keys() - body.keys()}, strict=True)
    maps = backbone.module(torch.randn(1, 3, 64, 96))
    assert {name: one.shape for name, one in maps.items()} == {"0": (1, backbone.out_channels, 64 / 16, 96 / 16)}
    patch = torch.randn(2, 1024, 14, 14)
    assert torch.equal(backbone.res5(patch), theirs.layer4(patch)) is not stride_in_1x1


def test_c5_is_torchvisions_trunk_up_to_its_last_stage() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet50_c5"))
    theirs = resnet.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    whole = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    backbone.module.get_submodule("body").load_state_dict(whole, strict=True)
    (conv5,) = backbone.module(torch.randn(1, 3, 64, 96)).values()
    assert conv5.shape == (1, backbone.out_channels, 64 / 32, 96 / 32)
    assert (backbone.out_channels, backbone.strides, backbone.pooled_strides) == (2048, (32,), {"0": 32})


def test_the_narrow_trunk_has_one_map_of_stride_32_too() -> None:
    backbone = build_backbone(BackboneConfig(name="narrow_resnet18_c5", width=8))
    (conv5,) = backbone.module(torch.randn(1, 3, 64, 96)).values()
    assert conv5.shape == (1, backbone.out_channels, 64 / 32, 96 / 32)
    assert (backbone.out_channels, backbone.res5) == (64, None)


def test_vgg16_is_torchvisions_up_to_conv5_3() -> None:
    backbone = build_backbone(BackboneConfig(name="vgg16"))
    theirs = vgg.make_layers(vgg.cfgs["D"])[:-1]  # torchvision's `features` without the last pooling
    theirs.load_state_dict(backbone.module.get_submodule("body").state_dict(), strict=True)
    image = torch.randn(1, 3, 64, 96)
    (conv5_3,) = backbone.module(image).values()
    assert conv5_3.shape == (1, backbone.out_channels, 64 / 16, 96 / 16)
    assert torch.equal(conv5_3, theirs(image))
    assert 0.1 < conv5_3.std() < 10  # random weights keep what goes through them at one scale


def test_a_norm_of_the_pyramid_needs_a_pyramid() -> None:
    with pytest.raises(ValidationError, match=r"'fpn_norm' is for the backbones named \*_fpn"):
        BackboneConfig(name="resnet50_c4", fpn_norm="batch_norm")


# Swin's maps are channels last, and it is made for one size of pictures.
@pytest.mark.parametrize("model", ["rexnet_100", "convnext_atto", "vgg11", "swin_tiny_patch4_window7_224"])
def test_a_trunk_of_timm_gets_a_pyramid_from_stride_4_on(model: str) -> None:
    pytest.importorskip("timm", reason="the extra 'timm' is not installed")
    backbone = build_backbone(BackboneConfig(name=f"timm/{model}", out_channels=8))
    assert backbone.strides == (4, 8, 16, 32, 64)
    maps = backbone.module.eval()(torch.randn(1, 3, 64, 128))
    assert [one.shape for one in maps.values()] == [(1, 8, 64 / stride, 128 / stride) for stride in backbone.strides]
    assert list(backbone.pooled_strides) == list(maps)[:-1]
    # "frozen_batch_norm" is the default: nothing that learns statistics is left.
    assert not [one for one in backbone.module.modules() if isinstance(one, nn.BatchNorm2d)]


def test_what_timm_does_not_have_is_refused_with_what_it_has() -> None:
    pytest.importorskip("timm", reason="the extra 'timm' is not installed")
    with pytest.raises(ModelStoreError, match=r"timm has no model 'rexnet_10'; did you mean one of: .*rexnet_100"):
        build_backbone(BackboneConfig(name="timm/rexnet_10"))
    with torch.device("meta"), pytest.raises(ModelStoreError, match=r"double from .*; pit_b_224 has 7, 14, 28"):
        build_backbone(BackboneConfig(name="timm/pit_b_224"))


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # what Python does for a package that is not there
    with pytest.raises(ModelStoreError, match="needs the package timm: pip install timm"):
        build_backbone(BackboneConfig(name="timm/rexnet_100"))
