"""What the operators and networks ask of a device. Called by `ops` and `modeling`."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor


def runs_ahead(tensor: Tensor) -> bool:
    """Whether the host only launches work on it, so that reading a number back waits for all that was launched."""
    return tensor.device.type != "cpu"


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the host without waiting for what the device is at: from memory that it reads by itself."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def has_triton() -> bool:
    """Whether kernels for CUDA can be compiled. Triton comes with PyTorch for CUDA on Linux."""
    return importlib.util.find_spec("triton") is not None
