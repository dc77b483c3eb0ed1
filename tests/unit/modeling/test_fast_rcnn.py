from __future__ import annotations

from typing import Any

import pytest
import torch

from service.errors import InvalidRequestError
from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.roi_heads import Selection

BOXES = torch.tensor([[4.0, 6, 40, 50], [20, 10, 60, 44]])


def network(architecture: str = "fast_rcnn", **tables: Any) -> GeneralizedRCNN:
    torch.manual_seed(0)
    document = {
        "architecture": architecture,
        "labels": ["cell"],
        "backbone": {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16},
        "transform": {"min_size": 96, "max_size": 96},
        "roi": {"box_head_channels": 16},
        **tables,
    }
    return build_model(ModelConfig.model_validate(document)).eval()


def picture() -> torch.Tensor:
    """A white square on black."""
    pixels = torch.zeros(64, 64, 3, dtype=torch.uint8)
    pixels[10:40, 20:50] = 255
    return pixels


def boxes_of(model: GeneralizedRCNN, proposals: torch.Tensor | None) -> torch.Tensor:
    (found,) = model.detect([picture()], [Selection(0.0, 50)], with_masks=[False], proposals=[proposals])
    return found.boxes


def test_it_answers_as_a_faster_rcnn_that_is_given_the_same_proposals() -> None:
    faster, fast = network("faster_rcnn"), network()
    weights = {key: value for key, value in faster.state_dict().items() if not key.startswith("rpn.")}
    fast.load_state_dict(weights, strict=True)
    assert len(boxes_of(fast, BOXES)) >= 1
    assert torch.equal(boxes_of(fast, BOXES), boxes_of(faster, BOXES))


def test_without_proposals_selective_search_finds_some_or_the_caller_is_told() -> None:
    assert len(boxes_of(network(), None)) >= 1
    assert len(boxes_of(network(proposals={"source": "caller"}), BOXES)) >= 1
    with pytest.raises(InvalidRequestError, match="option 'proposals'"):
        boxes_of(network(proposals={"source": "caller"}), None)


def test_proposals_of_training_are_resized_with_their_picture() -> None:
    """A picture of half the size with half the boxes is the same one after resizing."""
    model = network(roi={"box_head_channels": 16, "batch_size_per_image": 512}).train()
    small = torch.full((3, 48, 48), 0.5)
    targets = {"boxes": BOXES / 2, "labels": torch.tensor([1, 1]), "proposals": BOXES[:1] / 2 + 1}
    losses = model([small], [targets])
    doubled = {"boxes": BOXES, "labels": targets["labels"], "proposals": 2 * targets["proposals"]}
    torch.testing.assert_close(model([torch.full((3, 96, 96), 0.5)], [doubled]), losses)
    assert set(losses) == {"loss_classifier", "loss_box_reg"}


def test_training_without_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="expected targets"):
        network().train()([torch.zeros(3, 64, 64)])
