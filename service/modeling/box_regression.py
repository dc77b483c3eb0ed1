"""Decode boxes from regression outputs, bit for bit like torchvision's `BoxCoder`, but without its two
synchronizations: torchvision creates two one-element tensors on the device and waits for each.

Shapes: K boxes (x1, y1, x2, y2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder


def decode_boxes(coder: BoxCoder, deltas: Tensor, boxes: Tensor) -> Tensor:
    """Shift and scale each box.

    Args:
        coder: holds the regression weights and the limit on scaling.
        deltas: (K, 4) as (dx, dy, dw, dh).
        boxes: (K, 4).

    Returns:
        (K, 4).
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    centers = boxes[:, :2] + 0.5 * sides
    x_scale, y_scale, width_scale, height_scale = coder.weights
    shifts = torch.stack([deltas[:, 0] / x_scale, deltas[:, 1] / y_scale], dim=1)
    stretches = torch.stack([deltas[:, 2] / width_scale, deltas[:, 3] / height_scale], dim=1)
    new_centers = shifts * sides + centers
    half_sides = 0.5 * (torch.exp(stretches.clamp(max=coder.bbox_xform_clip)) * sides)
    return torch.cat([new_centers - half_sides, new_centers + half_sides], dim=1)
