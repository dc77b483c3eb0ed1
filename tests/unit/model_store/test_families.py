"""Networks that people put together from torchvision's parts answer here as they do there, from their state dicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import mobilenetv2, mobilenetv3
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from service.model_store.importing import import_checkpoint
from service.modeling.build import build_model
from service.modeling.roi_heads import Selection
from tests.random_detectors import blobs, enliven

LABELS = ("a", "b", "c")
HIDDEN = 32
SIZES = (16.0, 32.0, 64.0)
SMALL = {"min_size": 64, "max_size": 96}
ONE_MAP = {"anchors": {"sizes": [list(SIZES)]}}


def groups(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def one_map(trunk: nn.Module, channels: int) -> nn.Module:
    """A trunk that says its channels, as torchvision's page wants one."""
    trunk.out_channels = channels  # type: ignore[assignment]  # as everybody does
    return trunk


class Wrapped(nn.Module):
    """A trunk in a module of somebody's own."""

    def __init__(self, features: nn.Module, channels: int) -> None:
        super().__init__()
        self.features = features
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return x


def reading(channels: int) -> nn.Module:
    """A ResNet-18 with a pyramid whose first convolution reads so many channels."""
    backbone: nn.Module = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    body: Any = backbone.body
    body.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    return backbone


def grouped() -> nn.Module:
    """Group norms in the trunk; torchvision's helper does not hand a norm to the pyramid."""
    backbone: nn.Module = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=groups)
    blocks: Any = backbone.fpn
    for convolutions in (*blocks.inner_blocks, *blocks.layer_blocks):
        convolutions[0].bias = None
        convolutions.append(groups(256))
    return backbone


@dataclass(frozen=True)
class Family:
    """A network of torchvision, and what its owner has to say of it.

    Attributes:
        sizes: of its anchors, by map.
        given: to the import, beside the small sizes of these tests.
        name: that the import must find.
    """

    backbone: Callable[[], nn.Module]
    name: str
    sizes: tuple[tuple[float, ...], ...] = (SIZES,)
    ratios: tuple[tuple[float, ...], ...] = ((0.5, 1.0, 2.0),)
    given: dict[str, Any] = field(default_factory=lambda: dict(ONE_MAP))
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def pyramid(*sizes: float, **backbone: Any) -> dict[str, Any]:
    return {"anchors": {"sizes": [[size] for size in sizes]}, "backbone": backbone}


GREY = {"mean": [0.4], "std": [0.2]}
RGBA = {"mean": [0.4, 0.5, 0.6, 0.5], "std": [0.2, 0.3, 0.2, 1.0]}
FAMILIES = {
    "mobilenet_v2, as in the tutorial": Family(
        lambda: one_map(mobilenetv2.mobilenet_v2(weights=None).features, 1280), "torchvision/mobilenet_v2"
    ),
    "vgg11 without its last pooling": Family(
        lambda: one_map(models.vgg11(weights=None).features[:-1], 512),
        "torchvision/vgg11",
        given={**ONE_MAP, "backbone": {"features_stop": -1}},
    ),
    "squeezenet in a module of its own": Family(
        lambda: Wrapped(models.squeezenet1_1(weights=None).features, 512), "torchvision/squeezenet1_1"
    ),
    "the first parts of a mobilenet_v3": Family(
        lambda: one_map(mobilenetv3.mobilenet_v3_small(weights=None).features[:9], 48), "torchvision/mobilenet_v3_small"
    ),
    "the children of a resnet18": Family(
        lambda: one_map(nn.Sequential(*list(models.resnet18(weights=None).children())[:-2]), 512), "resnet18_c5"
    ),
    "resnext50": Family(
        lambda: resnet_fpn_backbone(backbone_name="resnext50_32x4d", weights=None),
        "resnext50_32x4d_fpn",
        sizes=((16,), (32,), (48,), (64,), (96,)),
        given=pyramid(16, 32, 48, 64, 96),
    ),
    "three maps": Family(
        lambda: resnet_fpn_backbone(backbone_name="resnet18", weights=None, returned_layers=[2, 3, 4]),
        "resnet18_fpn",
        sizes=((16,), (32,), (64,), (96,)),
        given=pyramid(16, 32, 64, 96),
    ),
    "three maps and two convolutions": Family(
        lambda: resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
        ),
        "resnet18_fpn",
        sizes=((16,), (32,), (48,), (64,), (96,)),
        given=pyramid(16, 32, 48, 64, 96),
    ),
    "two convolutions on the trunk's last stage": Family(
        lambda: resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, returned_layers=[3, 4], extra_blocks=LastLevelP6P7(512, 256)
        ),
        "resnet18_fpn",
        sizes=((16,), (32,), (64,), (96,)),
        given=pyramid(16, 32, 64, 96),
    ),
    "other ratios on each map": Family(
        lambda: resnet_fpn_backbone(backbone_name="resnet18", weights=None),
        "resnet18_fpn",
        sizes=((8, 16), (32,), (48, 50), (64,), (96,)),
        ratios=((1.0, 2.0), (0.5, 1.0, 2.0, 3.0), (1.0, 0.4), (0.2, 0.4, 0.6, 0.8), (1.0, 2.0, 3.0, 4.0)),
        given={
            "anchors": {
                "sizes": [[8, 16], [32], [48, 50], [64], [96]],
                "aspect_ratios": [[1, 2], [0.5, 1, 2, 3], [1, 0.4], [0.2, 0.4, 0.6, 0.8], [1, 2, 3, 4]],
            }
        },
    ),
    "group norms": Family(
        grouped, "resnet18_fpn", sizes=((16,), (32,), (48,), (64,), (96,)), given=pyramid(16, 32, 48, 64, 96)
    ),
    "one channel": Family(
        lambda: reading(1),
        "resnet18_fpn",
        sizes=((16,), (32,), (48,), (64,), (96,)),
        given={**pyramid(16, 32, 48, 64, 96), "transform": GREY},
        mean=(0.4,),
        std=(0.2,),
    ),
    "four channels": Family(
        lambda: reading(4),
        "resnet18_fpn",
        sizes=((16,), (32,), (48,), (64,), (96,)),
        given={**pyramid(16, 32, 48, 64, 96), "transform": RGBA},
        mean=(0.4, 0.5, 0.6, 0.5),
        std=(0.2, 0.3, 0.2, 1.0),
    ),
}


def torchvision_network(family: Family) -> FasterRCNN:
    """The network in torchvision's own classes."""
    backbone: Any = family.backbone()
    channels: int = backbone.out_channels
    ratios = family.ratios * (len(family.sizes) if len(family.ratios) == 1 else 1)
    return FasterRCNN(
        backbone,
        image_mean=list(family.mean),
        image_std=list(family.std),
        **SMALL,
        rpn_anchor_generator=AnchorGenerator(family.sizes, ratios),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        box_head=TwoMLPHead(channels * 49, HIDDEN),
        box_predictor=FastRCNNPredictor(HIDDEN, 4),
        rpn_post_nms_top_n_test=40,
    ).eval()


def picture(channels: int) -> tuple[Tensor, Tensor]:
    """The same picture as bytes (H, W, 3) and as torchvision's network gets it, (C, H, W) in 0 to 1."""
    pixels = torch.from_numpy(blobs(64, 96))
    if channels == 1:
        pixels = pixels[:, :, :1].expand(-1, -1, 3).contiguous()  # grey, of which nothing is lost
    floats = pixels.permute(2, 0, 1) / 255
    return pixels, {1: floats[:1], 3: floats, 4: torch.cat([floats, torch.ones(1, 64, 96)])}[channels]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_torchvisions_parts_answers_as_there(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family, path = FAMILIES[name], tmp_path / "checkpoint.pth"
    theirs = torchvision_network(family)
    pixels, image = picture(len(family.mean))
    enliven(theirs, lambda: theirs([image]))
    torch.save(theirs.state_dict(), path)
    with torch.no_grad():
        expected = theirs([image])[0]
    given = {**family.given, "rpn": {"post_nms_top_n_test": 40}}
    given["transform"] = {**given.get("transform", {}), **SMALL}
    imported = import_checkpoint(path, labels=LABELS, given=given)
    assert imported.config.backbone.name == family.name
    ours = build_model(imported.config).eval()
    ours.load_state_dict(imported.state_dict)
    [found] = ours.detect([pixels], [Selection(0.05, 100)], with_masks=[False], proposals=[None])
    assert len(expected["boxes"]) == len(found.boxes) >= 10
    torch.testing.assert_close(found.boxes, expected["boxes"], atol=1e-2, rtol=0)
    torch.testing.assert_close(found.scores, expected["scores"], atol=1e-3, rtol=0)
    assert torch.equal(found.labels, expected["labels"])
