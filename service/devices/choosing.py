"""Find the `Device` for a setting, a label or a torch device."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from service.devices.cpu import CpuDevice
from service.devices.device import Device
from service.errors import ServiceError

if TYPE_CHECKING:
    import torch


def choose_device(setting: str) -> Device:
    """The device for a setting.

    Args:
        setting: `auto` (CUDA if there is any, else the CPU), `cpu`, `cuda`, `cuda:1`, ….

    Raises:
        ServiceError: this machine has no such device.
    """
    if setting == "cpu":
        return device_named("cpu")
    import torch

    if setting == "auto":
        return device_named("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(setting)
    except RuntimeError:
        raise ServiceError(f"expected the device auto, cpu, cuda or cuda:N, got {setting!r}") from None
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ServiceError(f"no device {setting!r}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device_of(target)


def device_of(where: torch.device) -> Device:
    """The device for a torch device. Without an index it is the first of its kind."""
    return device_named("cpu" if where.type == "cpu" else f"{where.type}:{where.index or 0}")


@cache
def device_named(label: str) -> Device:
    """The device with this label.

    Raises:
        ServiceError: models cannot run on this kind of device.
    """
    if label == "cpu":
        return CpuDevice(label)
    if label.startswith("cuda"):
        # Imported here: it imports torch.
        from service.devices.cuda import CudaDevice

        return CudaDevice(label if ":" in label else f"{label}:0")
    raise ServiceError(f"expected the device auto, cpu, cuda or cuda:N, got {label!r}")


def count_gpus() -> int:
    """The number of GPUs that PyTorch sees."""
    import torch

    return torch.cuda.device_count()
