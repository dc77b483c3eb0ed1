"""`Device`: what the other rooms may ask of a device, with what holds for most of them. Importing this loads no torch,
which a process without a network does not need.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from service.errors import first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kernels = Literal["numba", "triton"]


class Clock(Protocol):
    """Measures the stages of one batch."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Measure what is done within; a stage that comes twice counts both times."""

    def seconds(self) -> Mapping[str, float]:
        """The time of each stage. To be asked once the batch's results are on the host."""


class Device(ABC):
    """One device.

    Attributes:
        label: what PyTorch calls it: `cpu`, `cuda:1`.
        runs_ahead: whether the host only launches work on it, so that reading a number back waits for all that was
            launched before.
        fastest_engine: what `auto` stands for.
        half_precision: the number format that `auto` stands for with an engine other than `eager`.
        precisions: the formats that a network can run in here.
    """

    runs_ahead: ClassVar[bool]
    fastest_engine: ClassVar[str]
    half_precision: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    # What a RuntimeError that is a lack of memory says. PyTorch has a class of its own only for its CUDA allocator.
    out_of_memory_words: ClassVar[tuple[str, ...]]

    def __init__(self, label: str) -> None:
        self.label = label

    @cached_property
    def torch_device(self) -> torch.device:
        """For tensors and modules."""
        import torch

        return torch.device(self.label)

    @abstractmethod
    def use(self, precision: str = "float32") -> AbstractContextManager[None]:
        """Make it this thread's current device, with arithmetic as the precision has it, until the context ends."""

    @abstractmethod
    def upload(self, tensor: Tensor) -> Tensor:
        """Copy a tensor of the host to the device, without waiting for the work that it has."""

    @property
    @abstractmethod
    def kernels(self) -> Kernels | None:
        """Which of our own kernels run on it; None if PyTorch's must do."""

    @abstractmethod
    def clock(self) -> Clock:
        """A clock for one batch, started and read within `use`."""

    @abstractmethod
    def probe(self) -> None:
        """Let the device do a little, and wait for it.

        Raises:
            RuntimeError: it cannot.
        """

    @abstractmethod
    def memory(self) -> Mapping[str, float]:
        """Bytes by kind: of a GPU `allocated`, `reserved` and `total`, of the CPU what this process has `resident`."""

    def release_memory(self) -> None:
        """Free what nobody uses any more."""
        gc.collect()  # Cycles of objects may hold tensors.

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether work on the device failed because there was not enough memory."""
        import torch

        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        return isinstance(error, RuntimeError) and any(words in str(error) for words in self.out_of_memory_words)

    @cached_property
    def compiler_problem(self) -> str | None:
        """Why `torch.compile` cannot compile for the device, in one line; None if it can. Found out by compiling a sum:
        Triton, a C compiler, its headers or a folder to write to may be missing.
        """
        import torch

        try:
            with self.use():
                torch.compile(torch.add)(torch.zeros(2, device=self.torch_device), 1)
        except Exception as error:  # Many kinds, by what is missing.
            return first_line(error)
        return None


class HostClock:
    """Takes the time of the host, which does the work itself."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """See `Clock`."""
        started = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def seconds(self) -> Mapping[str, float]:
        """See `Clock`."""
        return self._seconds
