"""A CUDA GPU as a `Device`."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.backends import cuda, cudnn

from service.devices.device import Clock, Device, Kernels, Recorder, Recording, Upload
from service.errors import ServiceError, first_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_UPLOADS_SHARE = 64
"""Pixels that wait for their batch on the GPU take at most its memory divided by this: 1.25 GB of 80 GB."""
_precision_flags = threading.RLock()
"""Held while PyTorch's flags of TF32, which are global to the process, have to stay as they are."""


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
    def use(self, precision: str | None = None) -> Iterator[None]:
        """See `Device`. Triton launches on the thread's current device, whatever device its arguments are on.

        PyTorch computes float32 convolutions in TF32, with 10 bits of mantissa instead of 23, unless told not to. That
        flag is global to the process, so it is set for each batch, and kept until the batch ends although other threads
        load models or probe the device meanwhile.
        """
        with ExitStack() as contexts:
            if precision is not None:
                contexts.enter_context(_tf32(allowed=precision == "tf32"))
            contexts.enter_context(torch.cuda.device(self.torch_device))
            yield

    def upload(self, tensor: Tensor) -> Tensor:
        """See `Device`: copies from pinned memory, which the GPU reads without the CPU."""
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)

    def download(self, tensor: Tensor) -> Tensor:
        """See `Device`: copies to pinned memory, which takes one transfer; else the driver copies piece by piece."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(self.torch_device).synchronize()
        return host

    def begin_upload(self, pixels: NDArray[np.uint8]) -> Upload | None:
        """See `Device`: copies on a stream of its own."""
        return self._uploads.begin(pixels)

    @cached_property
    def _uploads(self) -> _Uploads:
        return _Uploads(self.torch_device)

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

    def recorder(self) -> Recorder:
        """See `Device`: captures CUDA graphs."""
        return _GraphRecorder(self)

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


class _Uploads:
    """Copies that are begun before their batches, so that neither the batch nor the thread that launches its kernels
    waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._most_bytes = torch.cuda.get_device_properties(device).total_memory // _UPLOADS_SHARE
        self._lock = threading.Lock()
        self._waiting: WeakSet[_Upload] = WeakSet()

    def begin(self, pixels: NDArray[np.uint8]) -> Upload | None:
        """See `Device.begin_upload`."""
        upload = _Upload(pixels.nbytes)
        with self._lock:
            if upload.nbytes + sum(one.nbytes for one in self._waiting) > self._most_bytes:
                return None
            self._waiting.add(upload)
        try:
            with torch.cuda.stream(self._stream):
                # Filled by NumPy: PyTorch would start as many threads as there are cores for each thread that decodes.
                pinned = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
                np.copyto(pinned.numpy(), pixels)
                upload.fill(pinned.to(self._device, non_blocking=True), self._stream.record_event())
        except RuntimeError as error:  # no memory, or the device is lost: the batch will tell
            logger.info("pixels are not copied ahead", extra={"fields": {"reason": first_line(error)}})
            return None
        return upload


class _Upload:
    """See `Upload`."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None

    def fill(self, copy: Tensor, done: torch.cuda.Event) -> None:
        """Hold a copy until it is taken."""
        self._copy = copy, done

    def take(self) -> Tensor | None:
        """See `Upload`."""
        if self._copy is None:
            return None
        (copy, done), self._copy, self.nbytes = self._copy, None, 0
        stream = torch.cuda.current_stream(copy.device)
        stream.wait_event(done)
        # Else its memory could be filled with other pixels before this stream has read it.
        copy.record_stream(stream)
        return copy


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


@contextmanager
def _tf32(*, allowed: bool) -> Iterator[None]:
    with _precision_flags:
        before = cudnn.allow_tf32, cuda.matmul.allow_tf32
        try:
            cudnn.allow_tf32 = cuda.matmul.allow_tf32 = allowed
            yield
        finally:
            cudnn.allow_tf32, cuda.matmul.allow_tf32 = before


class _GraphRecorder:
    """Captures CUDA graphs; see `Recorder`.

    Each recorder has its own stream and memory pool. When PyTorch 2.12 and newer destroy a graph, they free cuBLAS's
    workspace of its stream, which other graphs of that stream still use (pytorch/pytorch#193402); and a pool whose
    graphs were all destroyed takes no new ones while any of its memory is in use.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device.torch_device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def record(self, work: Callable[[], Tensor]) -> Recording:
        """See `Recorder`."""
        stream, graph = self._stream, torch.cuda.CUDAGraph()
        with self._device.use():
            # Kernels are compiled and libraries allocate workspaces in their first runs, which must not happen during
            # the capture. A workspace belongs to a stream, hence the same one.
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    work()
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                output = work()
        self._graphs.append(graph)
        return _Graph(graph, output)

    def release(self) -> None:
        """See `Recorder`."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


@dataclass(slots=True, eq=False)
class _Graph:
    """See `Recording`."""

    graph: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> None:
        """See `Recording`."""
        self.graph.replay()


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
