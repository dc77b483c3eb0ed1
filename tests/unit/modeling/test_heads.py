from __future__ import annotations

import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from service.modeling.heads import DropoutMLPHead, Res5BoxHead, Res5MaskHead


def test_dropout_acts_in_training_alone() -> None:
    head, theirs = DropoutMLPHead(12, 200, dropout=0.5), TwoMLPHead(12, 200)
    theirs.load_state_dict(head.state_dict(), strict=True)
    patches = torch.rand(6, 3, 2, 2)
    torch.testing.assert_close(head.eval()(patches), theirs(patches))
    unlike = head.train()(patches)
    # About half of them are negative anyway, and half of the others are dropped.
    assert 0.6 < (unlike == 0).float().mean() < 0.9
    assert not torch.allclose(unlike, theirs(patches))


def test_res5_is_averaged_for_boxes_and_kept_for_masks() -> None:
    doubling = nn.AvgPool2d(2)
    patches = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert Res5BoxHead(doubling)(patches).tolist() == [[7.5]]
    assert Res5MaskHead(doubling)(patches).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]


def test_both_branches_train_the_same_res5_and_the_state_holds_it_once() -> None:
    res5 = nn.Conv2d(1, 2, 1)
    boxes, masks = Res5BoxHead(res5), Res5MaskHead(res5)
    assert set(boxes.state_dict()) == {"layer4.weight", "layer4.bias"}
    assert not masks.state_dict()
    masks(torch.ones(1, 1, 4, 4)).sum().backward()
    assert boxes.layer4.weight.grad is not None
