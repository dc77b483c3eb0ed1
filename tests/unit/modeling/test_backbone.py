import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

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
    with pytest.raises(ValidationError, match="'stride_in_1x1' is for resnet50_fpn and resnet101_fpn"):
        BackboneConfig(name="resnet18_fpn", stride_in_1x1=True)


def test_trunk_and_pyramid_have_the_norms_that_the_configuration_names() -> None:
    config = BackboneConfig(name="narrow_resnet18_fpn", width=8, norm_eps=0.5, fpn_norm="batch_norm")
    module = build_backbone(config).module
    trunk = [norm for norm in module.body.modules() if isinstance(norm, FrozenBatchNorm2d)]
    pyramid = [norm for norm in module.fpn.modules() if isinstance(norm, nn.BatchNorm2d)]
    # ResNet-18: one norm in the stem, four in each of four stages, three in shortcuts; a pyramid has two a level.
    assert [norm.eps for norm in trunk] == [0.5] * 20
    assert [norm.eps for norm in pyramid] == [1e-5] * 8
