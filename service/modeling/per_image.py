"""Expand per-image values to all boxes of a batch, without synchronizing with the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.devices import device_of


def image_indices(counts: Sequence[int], device: torch.device) -> Tensor:
    """The image of each box.

    Args:
        counts: number of boxes in each image.
        device: where the result is needed.

    Returns:
        (sum of counts,) int64, the image's index in the batch.
    """
    on_device = to_device(counts, torch.int64, device)
    return torch.repeat_interleave(on_device, output_size=sum(counts))


def to_device(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these values (numbers, or sequences of equal length), copied to the device without waiting for its
    queued work.
    """
    return device_of(device).upload(torch.tensor(values, dtype=dtype))
