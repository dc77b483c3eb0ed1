"""Expand per-image values to all boxes of a batch, without synchronizing with the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.devices import device_of


def image_indices(counts: Sequence[int], device: torch.device) -> Tensor:
    """(sum of counts,) int64: the image index of each box, given the number of boxes in each image."""
    on_device = to_device(counts, torch.int64, device)
    return torch.repeat_interleave(on_device, output_size=sum(counts))


def to_device(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these values, copied to the device without waiting for its queued work."""
    return device_of(device).upload(torch.tensor(values, dtype=dtype))
