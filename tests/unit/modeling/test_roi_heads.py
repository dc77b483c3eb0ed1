"""Which of overlapping detections stay, as each request wants it."""

from __future__ import annotations

import pytest
import torch

from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.modeling.roi_heads import RoIHeads, Selection

# Of one object, twice: IoU 0.8. The first is surer, and of class 1; the second of class 2.
BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8]])
LOGITS = torch.tensor([[0.0, 5, 0], [0, 0, 4]])
SIZE = (64, 64)
FEATURES = {str(level): torch.zeros(1, 16, 64 >> (level + 2), 64 >> (level + 2)) for level in range(4)}


def heads(**detections: object) -> RoIHeads:
    backbone = {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16}
    document = {"architecture": "faster_rcnn", "labels": ["a", "b"], "backbone": backbone, "detections": detections}
    return build_model(ModelConfig.model_validate(document)).eval().roi_heads


@torch.no_grad()
def labels_found(heads: RoIHeads, *selections: Selection) -> list[list[int]]:
    """The labels of each picture, all of which have the same two boxes."""
    count = len(selections)
    features = {name: one.expand(count, -1, -1, -1).contiguous() for name, one in FEATURES.items()}
    found = heads.detect_boxes(
        features,
        [BOXES] * count,
        [SIZE] * count,
        selections,
        box_head=lambda pooled: (LOGITS.repeat(count, 1), torch.zeros(len(pooled), 12)),
    )
    return [one.labels.tolist() for one in found]


def test_detections_of_other_classes_stay_unless_the_model_or_the_request_says_otherwise() -> None:
    plain, agnostic = heads(), heads(class_agnostic_nms=True)
    assert labels_found(plain, Selection(0.5, 10)) == [[1, 2]]
    assert labels_found(plain, Selection(0.5, 10, class_agnostic_nms=True)) == [[1]]
    assert labels_found(agnostic, Selection(0.5, 10)) == [[1]]
    assert labels_found(agnostic, Selection(0.5, 10, class_agnostic_nms=False)) == [[1, 2]]


@pytest.mark.parametrize(("thresh", "expected"), [(0.7, [1]), (0.9, [1, 2])])
def test_the_threshold_is_the_requests(thresh: float, expected: list[int]) -> None:
    assert labels_found(heads(), Selection(0.5, 10, nms_thresh=thresh, class_agnostic_nms=True)) == [expected]
    assert labels_found(heads(nms_thresh=thresh), Selection(0.5, 10, class_agnostic_nms=True)) == [expected]


def test_each_picture_of_a_batch_gets_its_own_threshold() -> None:
    selections = [
        Selection(0.5, 10),
        Selection(0.5, 10, class_agnostic_nms=True),
        Selection(0.5, 10, nms_thresh=0.9, class_agnostic_nms=True),
        Selection(0.5, 1),
        Selection(0.5, 10, nms_thresh=0.1, class_agnostic_nms=True),
    ]
    model = heads()
    assert labels_found(model, *selections) == [[1, 2], [1], [1, 2], [1], [1]]
    assert labels_found(model, *selections) == [labels_found(model, one)[0] for one in selections]
