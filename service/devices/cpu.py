"""The CPU as a `Device`. Does not import torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from service.devices.device import Clock, Device, HostClock, Kernels

if TYPE_CHECKING:
    from torch import Tensor


class CpuDevice(Device):
    """The processors of this machine, as one device."""

    runs_ahead = False
    fastest_engine = "openvino"
    half_precision = "float32"  # Few processors multiply in half precision; on the others it is far slower.
    precisions = ("float32", "bfloat16", "float16", "int8")
    out_of_memory_words = (
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",  # Windows
        "bad_alloc",  # a C++ library that was called
        "Failed to allocate",  # OpenVINO
    )

    def use(self, precision: str | None = None) -> AbstractContextManager[None]:
        """See `Device`: there is nothing to do."""
        return nullcontext()

    def upload(self, tensor: Tensor) -> Tensor:
        """See `Device`."""
        return tensor

    @property
    def kernels(self) -> Kernels | None:
        """See `Device`."""
        return "numba"

    def clock(self) -> Clock:
        """See `Device`."""
        return HostClock()

    def probe(self) -> None:
        """See `Device`: always succeeds, since this code runs on the CPU."""

    def memory(self) -> Mapping[str, float]:
        """See `Device`."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {"resident": pages * os.sysconf("SC_PAGE_SIZE")}
