"""A CUDA GPU as a `Device`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.backends import cuda, cudnn

from service.devices.device import Clock, Device, Kernels, Recording
from service.errors import ServiceError, first_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


class CudaDevice(Device):
    """One GPU."""

    runs_ahead = True
    fastest_engine = "compiled"
    half_precision = "float16"
    can_record = True
    precisions = ("float32", "tf32", "float16", "bfloat16")
    out_of_memory_words = (
        "out of memory",  # "CUDA error: ", "Triton Error [CUDA]: ", and the driver's own
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_NOT_INITIALIZED",  # cuBLAS allocates its workspace when it is first used
        "CUDNN_STATUS_ALLOC_FAILED",
        "DefaultCPUAllocator: can't allocate memory",  # pinned memory and results are in host memory
        "bad_alloc",
    )

    @contextmanager
    def use(self, precision: str = "float32") -> Iterator[None]:
        """See `Device`. Triton launches on the thread's current device, whatever its arguments lie on.

        PyTorch computes float32 convolutions in TF32, with 10 bits of mantissa instead of 23, unless told not to. That
        flag is global to the process, so it is set for each batch.
        """
        allowed = cudnn.allow_tf32, cuda.matmul.allow_tf32
        try:
            cudnn.allow_tf32 = cuda.matmul.allow_tf32 = precision == "tf32"
            with torch.cuda.device(self.torch_device):
                yield
        finally:
            cudnn.allow_tf32, cuda.matmul.allow_tf32 = allowed

    def upload(self, tensor: Tensor) -> Tensor:
        """See `Device`: copies from pinned memory, which the GPU reads without the CPU."""
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)

    @cached_property
    def kernels(self) -> Kernels | None:
        """See `Device`: Triton's, if it can compile and launch one here (it needs a C compiler)."""
        try:
            with self.use():
                _launch_probe(self.torch_device)
        except Exception as error:  # The type depends on what is missing.
            fields = {"device": self.label, "reason": first_line(error)}
            logger.warning("Triton does not work: PyTorch's kernels, which are slower", extra={"fields": fields})
            return None
        return "triton"

    def record(self, work: Callable[[], Tensor]) -> Recording:
        """See `Device`: captures a CUDA graph. All graphs of a device share one pool of working memory."""
        # Not `use`, which would set the precision: the caller has.
        with torch.cuda.device(self.torch_device):
            return _Graph(work, self._graph_pool)

    @cached_property
    def _graph_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def jpeg_decoder(self) -> Callable[[bytes], NDArray[np.uint8]]:
        """See `Device`: nvJPEG, by torchvision, which decodes one file at a time."""
        return _NvJpeg(self.torch_device)

    def clock(self) -> Clock:
        """See `Device`."""
        return _EventClock()

    def probe(self) -> None:
        """See `Device`."""
        with self.use():
            torch.zeros(1, device=self.torch_device).add_(1).item()

    def memory(self) -> Mapping[str, float]:
        """See `Device`."""
        return {
            "allocated": torch.cuda.memory_allocated(self.torch_device),
            "reserved": torch.cuda.memory_reserved(self.torch_device),
            "total": torch.cuda.get_device_properties(self.torch_device).total_memory,
        }

    def release_memory(self) -> None:
        """See `Device`; also returns the memory that PyTorch's allocator caches."""
        super().release_memory()
        if torch.cuda.is_initialized():
            with self.use():
                torch.cuda.empty_cache()


def _launch_probe(device: torch.device) -> None:
    """Compile a kernel, launch it, and check its result.

    Raises:
        Exception: of many types, depending on what is missing.
    """
    # Imported here: Triton comes with PyTorch for CUDA on Linux only.
    from service.devices import _triton_probe

    values = torch.zeros(2, device=device)
    _triton_probe.add_one[(2,)](values)
    if values.tolist() != [1.0, 1.0]:
        raise RuntimeError(f"expected a kernel to make [1, 1], got {values.tolist()}")


class _NvJpeg:
    """See `Device.jpeg_decoder`.

    nvJPEG's hardware writes its output without waiting for work that was queued on the stream before
    (meta-pytorch/torchcodec#1634), so it may overwrite memory that PyTorch's allocator has taken back from a running
    batch. The allocator returns memory to the stream that it was allocated on. Hence the stream of its own, on which
    memory is freed only once all work with it is done. Its high priority keeps it apart from the streams that PyTorch
    hands out elsewhere, of which there are only 32.
    """

    def __init__(self, device: torch.device) -> None:
        # torchvision announces another package for this.
        warnings.filterwarnings("ignore", message=r"\s*The image decoding and encoding", category=DeprecationWarning)
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        # Imported here: few servers use it.
        from torchvision.io import ImageReadMode, decode_jpeg

        # Not `CudaDevice.use`, which sets flags of the whole process.
        with torch.cuda.stream(self._stream):
            try:
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                [decoded] = decode_jpeg([encoded], mode=ImageReadMode.RGB, device=self._device)
            except RuntimeError as error:
                if "nvJPEG support" in str(error):
                    raise ServiceError("jpeg_decoder 'cuda' needs a torchvision that was built with nvJPEG") from error
                raise
            # The copy to the host waits; `decoded` must live until then.
            pixels: NDArray[np.uint8] = decoded.permute(1, 2, 0).contiguous().cpu().numpy()
        return pixels


class _Graph:
    """A captured CUDA graph; see `Recording`."""

    def __init__(self, work: Callable[[], Tensor], pool: Any) -> None:
        # Kernels are compiled and libraries allocate workspaces in their first runs, which must not happen during the
        # capture; these runs have to be on another stream than the default one.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        # Other threads may use the GPU meanwhile.
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.output = work()

    def replay(self) -> None:
        """See `Recording`."""
        self._graph.replay()

    def release(self) -> None:
        """See `Recording`."""
        self._graph.reset()


class _EventClock:
    """Measures GPU time from the start to the end of each stage, without synchronizing."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """See `Clock`."""
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        yield
        ended.record()
        self._spans.append((name, began, ended))

    def seconds(self) -> Mapping[str, float]:
        """See `Clock`. The results were copied to the host after all events, so the events are complete."""
        sums: dict[str, float] = {}
        for name, began, ended in self._spans:
            sums[name] = sums.get(name, 0.0) + began.elapsed_time(ended) / 1000
        return sums
