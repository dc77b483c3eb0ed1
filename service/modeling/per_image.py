"""One value an image, laid out for all boxes of a batch. Called by the RPN and the RoI heads; nothing here waits for
the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.devices import device_of


def image_indices(counts: Sequence[int], device: torch.device) -> Tensor:
    """(sum of counts,) int64: the index of each box's image, for so many boxes of each."""
    on_device = to_device(counts, torch.int64, device)
    return torch.repeat_interleave(on_device, output_size=sum(counts))


def to_device(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers, copied to the device without waiting for what it is at."""
    return device_of(device).upload(torch.tensor(values, dtype=dtype))
