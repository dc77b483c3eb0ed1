from __future__ import annotations

import math

import torch
from torchvision.models.detection._utils import BoxCoder

from service.modeling.box_regression import decode_boxes


def test_a_box_is_moved_by_its_sides_and_stretched() -> None:
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    # A box of 20 x 10 about (20, 15), moved by half its width, and made twice as high.
    deltas = torch.tensor([[5.0, 0.0, 0.0, 5 * math.log(2)]])
    torch.testing.assert_close(
        decode_boxes(coder, deltas, torch.tensor([[10.0, 10.0, 30.0, 20.0]])), torch.tensor([[20.0, 5.0, 40.0, 25.0]])
    )


def test_boxes_are_torchvisions_to_the_last_digit() -> None:
    """Empty boxes and stretches beyond the bound included."""
    torch.manual_seed(0)
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    corners = torch.rand(200, 2) * 800
    boxes = torch.cat([corners, corners + torch.rand(200, 2) * 300], dim=1)
    boxes[0] = 0
    deltas = torch.randn(200, 4) * 10
    torch.testing.assert_close(decode_boxes(coder, deltas, boxes), coder.decode_single(deltas, boxes), rtol=0, atol=0)
