"""What a device says of itself: whether it still works, and its memory. Called in the process that uses it.
Imports torch only for a GPU, so that a worker on the CPU needs none on its account.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def count_gpus() -> int:
    """The GPUs that PyTorch sees."""
    import torch

    return torch.cuda.device_count()


def probe(device: str) -> None:
    """Let the device do a little, and wait for it.

    Raises:
        RuntimeError: it cannot.
    """
    if device.startswith("cuda"):
        import torch

        torch.zeros(1, device=device).add_(1).item()


def memory(device: str) -> Mapping[str, float]:
    """Bytes by kind: of a GPU `allocated`, `reserved` and `total`, of the CPU what this process has `resident`."""
    if not device.startswith("cuda"):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {"resident": pages * os.sysconf("SC_PAGE_SIZE")}
    import torch

    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }
