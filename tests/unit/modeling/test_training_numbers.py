"""Every number of the configuration arrives where it counts: a network trains and answers as torchvision's detector
that was given the same ones, and otherwise than one with a single other number.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from service.modeling.backbone import build_backbone
from service.modeling.build import build_model
from service.modeling.config import BackboneConfig, ModelConfig
from tests.random_detectors import blobs, enliven

# No two alike, and none as by default.
RPN = {
    "pre_nms_top_n_train": 120,
    "pre_nms_top_n_test": 70,
    "post_nms_top_n_train": 110,
    "post_nms_top_n_test": 60,
    "nms_thresh": 0.6,
    "score_thresh": 0.3,
    "fg_iou_thresh": 0.55,
    "bg_iou_thresh": 0.25,
    "batch_size_per_image": 48,
    "positive_fraction": 0.15,
}
ROI = {
    "fg_iou_thresh": 0.55,
    "bg_iou_thresh": 0.3,
    "batch_size_per_image": 24,
    "positive_fraction": 0.35,
}
BOX_WEIGHTS = (9.0, 8.0, 4.0, 3.0)
DETECTIONS = {"score_thresh": 0.31, "nms_thresh": 0.4, "detections_per_img": 9}
# Without the threshold of scores: it cannot matter where the number that is kept does.
NUMBERS = [("rpn", key) for key in RPN if key != "score_thresh"] + [("roi", key) for key in (*ROI, "box_weights")]
SIDES = ((16,), (24,), (32,), (64,), (128,))
BACKBONE = {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16, "norm": "batch_norm"}
IMAGE = torch.from_numpy(blobs(96, 128)).permute(2, 0, 1) / 255
Answer = dict[str, Tensor]


def torchvisions(architecture: str) -> nn.Module:
    backbone = build_backbone(BackboneConfig.model_validate(BACKBONE)).module
    options: dict[str, Any] = {
        "backbone": backbone,
        "min_size": 96,
        "max_size": 128,
        "rpn_anchor_generator": AnchorGenerator(SIDES, ((0.5, 1.0, 2.0),) * 5),
        **{f"rpn_{key}": number for key, number in RPN.items()},
        "box_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        "box_head": TwoMLPHead(16 * 7 * 7, 32),
        "box_predictor": FastRCNNPredictor(32, 3),
        **{f"box_{key}": number for key, number in {**ROI, **DETECTIONS}.items()},
        "bbox_reg_weights": BOX_WEIGHTS,
    }
    if architecture == "faster_rcnn":
        return FasterRCNN(**options)
    masks = {
        "mask_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2),
        "mask_head": MaskRCNNHeads(16, (8,), dilation=1),
        "mask_predictor": MaskRCNNPredictor(8, 8, 3),
    }
    return MaskRCNN(**options, **masks)


def ours(architecture: str, *, default: tuple[str, str] | None = None) -> nn.Module:
    """The same network from a configuration, that leaves one number out if told to."""
    roi = {**ROI, "box_weights": BOX_WEIGHTS, "box_head_channels": 32}
    document: dict[str, Any] = {
        "architecture": architecture,
        "labels": ["a", "b"],
        "backbone": BACKBONE,
        "transform": {"min_size": 96, "max_size": 128},
        "anchors": {"sizes": SIDES},
        "rpn": RPN,
        "roi": {**roi, "mask_head_channels": [8]} if architecture == "mask_rcnn" else roi,
        "detections": DETECTIONS,
    }
    if default is not None:
        table, key = default
        document[table] = {name: number for name, number in document[table].items() if name != key}
    return build_model(ModelConfig.model_validate(document))


@cache
def weights(architecture: str) -> dict[str, Tensor]:
    """At random, so that scores and boxes differ."""
    torch.manual_seed(0)
    model = torchvisions(architecture).eval()
    enliven(model, lambda: model([IMAGE]))
    return model.state_dict()


def losses_and_detections(model: nn.Module, architecture: str) -> tuple[Answer, Answer]:
    """Of one picture with many objects, the same anchors and proposals sampled every time."""
    model.load_state_dict(weights(architecture))
    corners = torch.cartesian_prod(torch.arange(4.0, 100, 16), torch.arange(3.0, 70, 13))
    boxes = torch.cat(
        [corners, corners + torch.randint(14, 27, corners.shape, generator=torch.Generator().manual_seed(1))], dim=1
    )
    masks = torch.zeros(len(boxes), 96, 128, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    torch.manual_seed(2)
    target = {"boxes": boxes, "labels": torch.arange(len(boxes)) % 2 + 1, "masks": masks}
    losses: Answer = model.train()([IMAGE], [target])
    with torch.no_grad():
        (found,) = model.eval()([IMAGE])
    return losses, found


@pytest.mark.parametrize("architecture", ["faster_rcnn", "mask_rcnn"])
def test_losses_and_detections_are_torchvisions_with_the_same_numbers(architecture: str) -> None:
    expected_losses, expected = losses_and_detections(torchvisions(architecture), architecture)
    losses, found = losses_and_detections(ours(architecture), architecture)
    assert len(losses) == (5 if architecture == "mask_rcnn" else 4)
    torch.testing.assert_close(losses, expected_losses, atol=1e-6, rtol=1e-5)
    assert len(expected["boxes"]) == DETECTIONS["detections_per_img"]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("table", "key"), NUMBERS)
def test_no_number_is_without_effect(table: str, key: str) -> None:
    """Or the test above would not notice it in the wrong place."""
    all_set = losses_and_detections(ours("faster_rcnn"), "faster_rcnn")
    one_left_out = losses_and_detections(ours("faster_rcnn", default=(table, key)), "faster_rcnn")
    assert differs(all_set[0], one_left_out[0]) or differs(all_set[1], one_left_out[1])


def differs(one: Answer, other: Answer) -> bool:
    return any(one[key].shape != other[key].shape or not torch.allclose(one[key], other[key]) for key in one)


@pytest.mark.parametrize("architecture", ["faster_rcnn", "mask_rcnn"])
def test_the_best_anchor_of_an_object_is_foreground_however_badly_it_fits(architecture: str) -> None:
    anchors = torch.tensor([[0.0, 0, 16, 16], [0, 0, 32, 32], [40, 40, 56, 56], [40, 40, 48, 48]])
    # IoU of the first object: 64 / 256 = 0.25 and 64 / 1024; of the second: 64 / 256 and 1.
    objects = torch.tensor([[0.0, 0, 8, 8], [40, 40, 48, 48]])
    rpn = ours(architecture).rpn
    labels, matched = rpn.assign_targets_to_anchors([anchors], [{"boxes": objects}])  # type: ignore[operator,union-attr]
    assert labels[0].tolist() == [1, 0, -1, 1]
    assert matched[0][[0, 3]].tolist() == objects.tolist()
