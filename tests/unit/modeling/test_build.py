from __future__ import annotations

import re
import tomllib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet, vgg
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from service.errors import ModelStoreError
from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.modeling.generalized_rcnn import GeneralizedRCNN

PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
SIZES = (16, 32, 64)


def network(**tables: Any) -> GeneralizedRCNN:
    """A small network, with the given tables in its configuration."""
    backbone = {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16}
    config = {"architecture": "faster_rcnn", "labels": ["cell"], "backbone": backbone, **tables}
    return build_model(ModelConfig.model_validate(config))


def test_the_box_head_is_sized_to_the_bins_of_the_pyramid() -> None:
    model = network(roi={"op": "spp", "spp_levels": [3, 2], "box_head_channels": 32})
    assert model.roi_heads.box_head.fc6.weight.shape == (32, 16 * (9 + 4))
    found = model.eval()([torch.zeros(3, 64, 64)])[0]
    assert found["boxes"].shape[1] == 4


class Trunk(nn.Module):
    """A backbone as torchvision's page on `FasterRCNN` describes one: a module that says its `out_channels`."""

    def __init__(self, trunk: nn.Module, last: str, out_channels: int) -> None:
        super().__init__()
        self.body = IntermediateLayerGetter(trunk, {last: "0"})
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x)


def torchvision_detector(name: str) -> FasterRCNN:
    """Put together from torchvision's parts alone."""
    if name == "vgg16":
        backbone = Trunk(vgg.make_layers(vgg.cfgs["D"]), "29", 512)
        box_head: nn.Module = TwoMLPHead(512 * 14 * 14, 32)
        predictor = FastRCNNPredictor(32, 2)
    else:
        trunk = resnet.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
        backbone = Trunk(trunk, "layer3", 1024)
        parts = {"layer4": trunk.layer4, "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
        box_head, predictor = nn.Sequential(OrderedDict(parts)), FastRCNNPredictor(2048, 2)
    return FasterRCNN(
        backbone,
        min_size=96,
        max_size=128,
        rpn_anchor_generator=AnchorGenerator((SIZES,), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        box_head=box_head,
        box_predictor=predictor,
        box_score_thresh=0.0,
        rpn_post_nms_top_n_test=50,
    )


@pytest.mark.parametrize("name", ["vgg16", "resnet50_c4"])
def test_one_map_detectors_with_torchvisions_weights_give_its_boxes(name: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision_detector(name).eval()
    ours = network(
        backbone={"name": name},
        transform={"min_size": 96, "max_size": 128},
        anchors={"sizes": [SIZES]},
        rpn={"post_nms_top_n_test": 50},
        roi={"box_output_size": 14, **({"box_head_channels": 32} if name == "vgg16" else {})},
        detections={"score_thresh": 0.0},
    ).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.rand(3, 80, 100)
    with torch.inference_mode():
        expected, found = theirs([image])[0], ours([image])[0]
    assert len(expected["boxes"]) >= 10
    # Our RoI kernel adds in another order. Scores of random weights are small: they are compared by their ratio.
    torch.testing.assert_close(found["boxes"], expected["boxes"], atol=1e-3, rtol=0)
    torch.testing.assert_close(found["scores"], expected["scores"], atol=0, rtol=1e-3)
    assert torch.equal(found["labels"], expected["labels"])


def test_the_papers_networks_on_the_page_are_built_as_it_says() -> None:
    documents = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)]
    networks = {(one["architecture"], one["backbone"]["name"]): one for one in documents if "backbone" in one}
    with torch.device("meta"):  # shapes without the 500 MB
        built = {name: build_model(ModelConfig.model_validate(one)) for name, one in networks.items()}
    vgg16, c4 = built["faster_rcnn", "vgg16"], built["mask_rcnn", "resnet50_c4"]
    assert vgg16.roi_heads.box_head.fc6.weight.shape == (4096, 512 * 7 * 7)
    assert vgg16.get_parameter("rpn.head.cls_logits.bias").shape == (9,)
    assert c4.get_parameter("rpn.head.cls_logits.bias").shape == (15,)
    assert c4.roi_heads.mask_predictor.conv5_mask.weight.shape == (2048, 256, 2, 2)
    assert c4.roi_heads.mask_head(torch.zeros(3, 1024, 14, 14, device="meta")).shape == (3, 2048, 7, 7)
    r_cnn = built["rcnn", "vgg16"]
    assert r_cnn.get_parameter("roi_heads.box_roi_pool.box_head.fc6.weight").shape == (4096, 512 * 7 * 7)


def test_anchors_that_do_not_fit_a_trunk_of_timm_are_refused_with_its_strides() -> None:
    pytest.importorskip("timm", reason="the extra 'timm' is not installed")
    with pytest.raises(ModelStoreError, match="5 feature maps of timm/rexnet_100, of strides 4, 8, 16, 32, 64, got 1"):
        network(backbone={"name": "timm/rexnet_100"}, anchors={"sizes": [[32]]})
