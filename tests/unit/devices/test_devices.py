"""Devices are chosen by name, and used so that what runs on them is what was asked for. CUDA is looked at without a
GPU: what it is told, not what it does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import simplejpeg
import torch
import torchvision
from torchvision.io import ImageReadMode

from service.devices import choose_device, device_named, device_of
from service.devices.cpu import CpuDevice
from service.devices.cuda import CudaDevice
from service.devices.device import HostClock
from service.errors import ServiceError

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_a_label_a_setting_and_a_tensor_mean_the_same_device() -> None:
    assert choose_device("cpu") is device_named("cpu") is device_of(torch.zeros(1).device)
    assert device_named("cuda:1").torch_device == torch.device("cuda", 1)
    assert device_named("cuda").label == "cuda:0"  # one label for one card, however it was asked for
    assert device_of(torch.device("cuda")).label == "cuda:0"


@NO_GPU
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert choose_device("auto") is device_named("cpu")


@pytest.mark.parametrize("setting", ["cuda:63", "gpu", "mps", "cpu:x"])
def test_device_that_is_not_there_is_refused(setting: str) -> None:
    with pytest.raises(ServiceError, match=r"no device 'cuda:63'|expected the device auto, cpu, cuda or cuda:N, got"):
        choose_device(setting)


def test_a_process_on_the_cpu_loads_no_torch() -> None:
    program = (
        "import sys\n"
        "from service.devices import choose_device, device_named\n"
        "device = choose_device('cpu')\n"
        "device.probe(); device.memory(); device.release_memory()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@contextmanager
def recorded_device(chosen: list[torch.device]) -> Iterator[None]:
    """As if there was a GPU to make current."""

    @contextmanager
    def make_current(device: torch.device) -> Iterator[None]:
        chosen.append(device)
        yield

    with patch.object(torch.cuda, "device", make_current):
        yield


@pytest.mark.parametrize(("precision", "allowed"), [("float32", False), ("tf32", True), ("float16", False)])
def test_float32_is_not_tf32_unless_it_is_asked_for(precision: str, allowed: bool) -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    chosen: list[torch.device] = []
    with recorded_device(chosen), CudaDevice("cuda:1").use(precision):
        assert torch.backends.cudnn.allow_tf32 is allowed
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
        # Triton launches on the current device, wherever its arguments lie.
        assert chosen == [torch.device("cuda", 1)]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


@NO_GPU
def test_kernels_that_triton_cannot_launch_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    with recorded_device([]):
        assert CudaDevice("cuda:0").kernels is None
    assert "Triton does not work" in caplog.text


def test_the_probe_of_triton_adds_one() -> None:
    """By Triton's interpreter; whether it interprets is settled when it is imported, so in a process of its own."""
    pytest.importorskip("triton")
    program = "import torch\nfrom service.devices.cuda import _launch_probe\n_launch_probe(torch.device('cpu'))\n"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_kernel_that_does_something_else_is_noticed() -> None:
    pytest.importorskip("triton")
    from service.devices import _triton_probe, cuda

    class Idle:
        def __getitem__(self, grid: tuple[int]) -> object:
            return lambda values: None

    with patch.object(_triton_probe, "add_one", Idle()), pytest.raises(RuntimeError, match=r"got \[0.0, 0.0\]"):
        cuda._launch_probe(torch.device("cpu"))


def test_a_stage_that_comes_twice_took_both_times() -> None:
    """As a network's that searches for proposals and then scales them."""
    clock = HostClock()
    with patch("time.perf_counter", side_effect=[1.0, 3.0, 10.0, 14.0, 20.0, 21.0]):
        for stage in ("rpn", "rpn", "backbone"):
            with clock.stage(stage):
                pass
    assert clock.seconds() == {"rpn": 6.0, "backbone": 1.0}


class FakeEvent:
    """Records the count of the events before it, as milliseconds."""

    count = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.count
        FakeEvent.count += 1

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_on_cuda_stages_are_timed_by_events_and_read_at_the_end() -> None:
    clock = CudaDevice("cuda:0").clock()
    with patch.object(torch.cuda, "Event", FakeEvent):
        with clock.stage("preprocess"):
            pass
        with clock.stage("rpn"), clock.stage("within"):
            pass
        with clock.stage("rpn"):
            pass
    assert clock.seconds() == {"preprocess": 0.001, "within": 0.001, "rpn": 0.004}


def test_what_the_compiler_lacks_is_said_in_one_line() -> None:
    device = CpuDevice("cpu")
    with patch.object(torch, "compile", side_effect=RuntimeError("\n  no C compiler found\nand much more")):
        assert device.compiler_problem == "no C compiler found"
    assert device.compiler_problem == "no C compiler found"  # asked once


def test_work_is_recorded_after_runs_on_another_stream_and_all_recordings_share_one_pool() -> None:
    """What CUDA is told: without a GPU nothing is recorded."""
    told: list[str] = []

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        told.append(f"{name} begins")
        yield
        told.append(f"{name} ends")

    def work() -> torch.Tensor:
        told.append("work")
        return torch.zeros(1)

    def stream() -> MagicMock:
        return MagicMock(wait_stream=lambda other: told.append("wait"))

    graph = MagicMock(replay=lambda: told.append("replay"), reset=lambda: told.append("reset"))
    pools = []

    def capture(of: MagicMock, *, pool: object, capture_error_mode: str) -> AbstractContextManager[None]:
        assert capture_error_mode == "thread_local"  # other threads may use the GPU
        pools.append(pool)
        return noted("capture")

    device = CudaDevice("cuda:0")
    with ExitStack() as patches:
        for name, fake in {
            "device": lambda device: nullcontext(),
            "Stream": stream,
            "current_stream": stream,
            "stream": lambda stream: noted("stream"),
            "CUDAGraph": lambda: graph,
            "graph": capture,
            "graph_pool_handle": object,
        }.items():
            patches.enter_context(patch.object(torch.cuda, name, fake))
        recording = device.record(work)
        device.record(work)
        recording.replay()
        recording.release()
    once = ["wait", "stream begins", "work", "work", "stream ends", "wait", "capture begins", "work", "capture ends"]
    assert told == [*once, *once, "replay", "reset"]
    assert pools[0] is pools[1]
    with pytest.raises(RuntimeError, match="cpu cannot record"):
        CpuDevice("cpu").record(work)


def test_recording_keeps_the_precision_that_the_caller_set() -> None:
    seen = []

    def graph(work: Callable[[], torch.Tensor], pool: object) -> None:
        seen.append(torch.backends.cuda.matmul.allow_tf32)

    device = CudaDevice("cuda:0")
    with (
        recorded_device([]),
        patch.object(torch.cuda, "graph_pool_handle"),
        patch("service.devices.cuda._Graph", graph),
        device.use("tf32"),
    ):
        device.record(lambda: torch.zeros(1))
    assert seen == [True]


class FakeStream:
    def __init__(self, device: torch.device, priority: int) -> None:
        self.device = device
        self.priority = priority


@contextmanager
def fake_nvjpeg(decode_jpeg: object) -> Iterator[list[FakeStream]]:
    """As if there was nvJPEG; yields the current streams of its calls."""
    current: list[FakeStream] = []

    def use(stream: FakeStream) -> AbstractContextManager[None]:
        current.append(stream)
        return nullcontext()

    with (
        patch.object(torch.cuda, "Stream", FakeStream),
        patch.object(torch.cuda, "stream", use),
        patch("torchvision.io.decode_jpeg", decode_jpeg),
    ):
        yield current


def jpeg() -> bytes:
    pixels = np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3)
    data: bytes = simplejpeg.encode_jpeg(pixels)
    return data


def test_on_cuda_jpegs_are_decoded_to_rgb_on_a_stream_of_their_own() -> None:
    """What torchvision is told: here its CPU's decoder stands in."""

    def decode(files: list[torch.Tensor], mode: ImageReadMode, device: torch.device) -> list[torch.Tensor]:
        assert device == torch.device("cuda", 1)
        return [*decode_on_cpu(files, mode)]

    decode_on_cpu = torchvision.io.decode_jpeg
    before = torch.backends.cudnn.allow_tf32
    with fake_nvjpeg(decode) as streams:
        decoder = CudaDevice("cuda:1").jpeg_decoder()
        pixels = [decoder(jpeg()) for _ in range(2)]
    assert torch.backends.cudnn.allow_tf32 is before
    assert streams[0] is streams[1]
    # Streams of the usual priority are shared with everything else in the process.
    assert (streams[0].device, streams[0].priority) == (torch.device("cuda", 1), -1)
    for one in pixels:
        assert np.array_equal(one, simplejpeg.decode_jpeg(jpeg()))
        assert one.flags.c_contiguous
        assert one.flags.writeable


def test_without_nvjpeg_the_decoder_says_so_and_other_errors_stay_theirs() -> None:
    missing = RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")
    with fake_nvjpeg(MagicMock(side_effect=[missing, RuntimeError("Failed to get image info: 2")])):
        decoder = CudaDevice("cuda:0").jpeg_decoder()
        with pytest.raises(ServiceError, match="needs a torchvision that was built with nvJPEG"):
            decoder(jpeg())
        with pytest.raises(RuntimeError, match="image info"):
            decoder(jpeg())
    with pytest.raises(ServiceError, match="needs models to run on CUDA; they run on cpu"):
        CpuDevice("cpu").jpeg_decoder()
