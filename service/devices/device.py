"""`Device`: the interface of all devices, with defaults that suit most. Importing it does not import torch, which a
process without a network does not need.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from service.errors import ServiceError, first_line

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

Kernels = Literal["numba", "triton"]


class Clock(Protocol):
    """Measures the stages of one batch."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Measure the code in this context. The times of a repeated stage are added up."""

    def seconds(self) -> Mapping[str, float]:
        """The time of each stage. Read it once the batch's results are on the host."""


class Upload(Protocol):
    """A copy from the host to the device that was begun before its use, and may be under way."""

    def take(self) -> Tensor | None:
        """The copy, for work that this thread queues from now on; None if it was taken before, since it is kept no
        longer than it has to be.
        """


class Recording(Protocol):
    """Work that was recorded once and can be replayed with other values in the same memory.

    Attributes:
        output: what the work returned; each replay overwrites it.
    """

    output: Tensor

    def replay(self) -> None:
        """Queue the work."""


class Recorder(Protocol):
    """Makes recordings that share their working memory, so that all of them end together."""

    def record(self, work: Callable[[], Tensor]) -> Recording:
        """Record work on the device. It must not wait for the device or copy from the host, its tensors must have the
        same sizes each time, and whatever it reads must stay where it is; it is run some times before it is recorded.

        Raises:
            RuntimeError: it cannot be recorded. Nothing more should be recorded in this process.
        """

    def release(self) -> None:
        """Free the memory of all recordings. None can be made or replayed afterwards."""


class Device(ABC):
    """One device.

    Attributes:
        label: what PyTorch calls it: `cpu`, `cuda:1`.
        runs_ahead: whether work is launched asynchronously, so that reading a value back waits for everything launched
            before.
        fastest_engine: the engine that `auto` means.
        half_precision: the number format that `auto` means with an engine other than `eager`.
        precisions: the formats that a network can run in here.
        can_record: whether `recorder` works.
    """

    runs_ahead: ClassVar[bool]
    fastest_engine: ClassVar[str]
    half_precision: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    can_record: ClassVar[bool] = False
    # Phrases that identify a RuntimeError as out of memory. PyTorch has a dedicated class only for its CUDA allocator.
    out_of_memory_words: ClassVar[tuple[str, ...]]

    def __init__(self, label: str) -> None:
        self.label = label

    @cached_property
    def torch_device(self) -> torch.device:
        """For tensors and modules."""
        import torch

        return torch.device(self.label)

    @abstractmethod
    def use(self, precision: str | None = None) -> AbstractContextManager[None]:
        """Make it this thread's current device until the context ends.

        Args:
            precision: of the arithmetic in this context. Contexts of other threads that name one wait meanwhile, even
                if it is the same. None for code that computes nothing whose precision matters.
        """

    @abstractmethod
    def upload(self, tensor: Tensor) -> Tensor:
        """Copy a tensor from the host to the device, without waiting for work already queued there."""

    def download(self, tensor: Tensor) -> Tensor:
        """Copy a tensor from the device to the host, and wait for it and for all work queued before."""
        return tensor.cpu()

    def begin_upload(self, pixels: NDArray[np.uint8]) -> Upload | None:
        """Begin to copy while other work runs on the device. Any thread may call it. None if there is nothing to gain,
        or no room.
        """
        return None

    @property
    @abstractmethod
    def kernels(self) -> Kernels | None:
        """Which of our own kernels run on it; None if only PyTorch's do."""

    @abstractmethod
    def clock(self) -> Clock:
        """A clock for one batch, started and read within `use`."""

    @abstractmethod
    def probe(self) -> None:
        """Run a tiny piece of work on the device and wait for it.

        Raises:
            RuntimeError: the device failed.
        """

    @abstractmethod
    def memory(self) -> Mapping[str, float]:
        """Bytes by kind: `allocated`, `reserved` and `total` of a GPU; the process's `resident` memory on the CPU."""

    def recorder(self) -> Recorder:
        """A new recorder.

        Raises:
            RuntimeError: work on this kind of device cannot be recorded.
        """
        raise RuntimeError(f"{self.label} cannot record work")

    def jpeg_decoder(self) -> Callable[[bytes], NDArray[np.uint8]]:
        """A function that decodes a JPEG on the device and returns (H, W, 3) uint8 RGB on the host, as stored.

        Several threads may call it at once, whatever else runs on the device. It raises RuntimeError if the file cannot
        be decoded, and ServiceError if there is no decoder in this installation.

        Raises:
            ServiceError: this kind of device has no decoder.
        """
        raise ServiceError(f"jpeg_decoder 'cuda' needs models to run on CUDA; they run on {self.label}")

    def release_memory(self) -> None:
        """Free memory that is no longer used."""
        gc.collect()  # Reference cycles may hold tensors.

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether work on the device failed because there was not enough memory."""
        import torch

        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        return isinstance(error, RuntimeError) and any(words in str(error) for words in self.out_of_memory_words)

    @cached_property
    def compiler_problem(self) -> str | None:
        """Why `torch.compile` cannot compile for the device, in one line; None if it can. It tries to compile a sum:
        Triton, a C compiler, its headers or a folder to write to may be missing.
        """
        import torch

        try:
            with self.use():
                torch.compile(torch.add)(torch.zeros(2, device=self.torch_device), 1)
        except Exception as error:  # The type depends on what is missing.
            return first_line(error)
        return None


class HostClock:
    """Measures host time, for devices on which the host does the work."""

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
