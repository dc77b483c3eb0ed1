"""Devices are chosen by name, and used so that what runs on them is what was asked for. CUDA is looked at without a
GPU: what it is told, not what it does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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


def test_precision_stays_for_a_whole_batch_whatever_other_threads_do() -> None:
    """A server loads models and probes its devices while batches run, and the flags are the whole process's."""

    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    def load() -> tuple[bool, bool]:
        begun.set()
        with CudaDevice("cuda:0").use("float32"):
            return flags()

    device, before, begun = CudaDevice("cuda:0"), flags(), threading.Event()
    with recorded_device([]), ThreadPoolExecutor(1) as thread:
        with device.use("tf32"):
            with device.use():  # as to probe or to free memory
                assert flags() == (True, True)
            loading = thread.submit(load)
            begun.wait()
            assert not loading.done()
            assert flags() == (True, True)
        assert loading.result() == (False, False)
    assert flags() == before


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


class FakeGraphs:
    """As if there was a GPU that captures graphs: notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.streams: list[object] = []
        self.pools: list[object] = []

    @contextmanager
    def noted(self, name: str) -> Iterator[None]:
        self.told.append(f"{name} begins")
        yield
        self.told.append(f"{name} ends")

    def stream(self, device: torch.device | None = None) -> MagicMock:
        return MagicMock(wait_stream=lambda other: self.told.append("wait"))

    def run_on(self, stream: object) -> AbstractContextManager[None]:
        self.streams.append(stream)
        return self.noted("stream")

    def graph(self) -> MagicMock:
        return MagicMock(replay=lambda: self.told.append("replay"), reset=lambda: self.told.append("reset"))

    def capture(
        self, of: MagicMock, *, pool: object, stream: object, capture_error_mode: str
    ) -> AbstractContextManager[None]:
        assert capture_error_mode == "thread_local"  # other threads may use the GPU
        self.streams.append(stream)
        self.pools.append(pool)
        return self.noted("capture")

    def work(self) -> torch.Tensor:
        self.told.append("work")
        return torch.zeros(1)


@contextmanager
def fake_graphs() -> Iterator[FakeGraphs]:
    fake = FakeGraphs()
    with ExitStack() as patches:
        for name, function in {
            "device": lambda device: nullcontext(),
            "Stream": fake.stream,
            "current_stream": fake.stream,
            "stream": fake.run_on,
            "CUDAGraph": fake.graph,
            "graph": fake.capture,
            "graph_pool_handle": object,
        }.items():
            patches.enter_context(patch.object(torch.cuda, name, function))
        yield fake


def test_work_is_recorded_after_runs_on_the_same_stream() -> None:
    """What CUDA is told: without a GPU nothing is recorded. A library's workspace belongs to a stream."""
    with fake_graphs() as fake:
        recorder = CudaDevice("cuda:0").recorder()
        recording = recorder.record(fake.work)
        recorder.record(fake.work)
        recording.replay()
        recorder.release()
    once = ["wait", "stream begins", "work", "work", "stream ends", "wait", "capture begins", "work", "capture ends"]
    assert fake.told == [*once, *once, "replay", "reset", "reset"]
    assert len(set(map(id, fake.streams))) == 1
    assert len(set(map(id, fake.pools))) == 1
    with pytest.raises(RuntimeError, match="cpu cannot record"):
        CpuDevice("cpu").recorder()


def test_each_recorder_has_its_own_stream_and_memory() -> None:
    """PyTorch frees the workspace of a graph's stream together with the graph, whoever else uses it."""
    with fake_graphs() as fake:
        device = CudaDevice("cuda:0")
        for _ in range(2):
            device.recorder().record(fake.work)
    assert fake.streams[0] is fake.streams[1]
    assert fake.streams[2] is fake.streams[3]
    assert fake.streams[0] is not fake.streams[2]
    assert fake.pools[0] is not fake.pools[1]


def test_recording_keeps_the_precision_that_the_caller_set() -> None:
    seen = []

    def work() -> torch.Tensor:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return torch.zeros(1)

    device = CudaDevice("cuda:0")
    with fake_graphs(), device.use("tf32"):
        device.recorder().record(work)
    assert seen == [True, True, True]


@contextmanager
def fake_uploads(*, total_memory: int) -> Iterator[list[str]]:
    """As if there was a GPU to copy to, whose memory is the host's; yields what is told to streams."""
    told: list[str] = []
    empty = torch.empty

    def pinned(shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory  # else the copy would wait
        return empty(shape, dtype=dtype)

    def run_on(stream: MagicMock) -> AbstractContextManager[None]:
        told.append("copy")
        return nullcontext()

    batch = MagicMock(
        wait_event=lambda event: told.append(f"wait for {event}"), synchronize=lambda: told.append("wait for all")
    )
    with ExitStack() as patches:
        for name, function in {
            "Stream": lambda device: MagicMock(record_event=lambda: "the copy"),
            "stream": run_on,
            "current_stream": lambda device: batch,
            "get_device_properties": lambda device: MagicMock(total_memory=total_memory),
        }.items():
            patches.enter_context(patch.object(torch.cuda, name, function))
        patches.enter_context(patch.object(torch, "empty", pinned))
        patches.enter_context(
            patch.object(torch.Tensor, "record_stream", lambda copy, stream: told.append("keep for the batch"))
        )
        yield told


def copying_device() -> CudaDevice:
    device = CudaDevice("cuda:0")
    vars(device)["torch_device"] = torch.device("cpu")
    return device


def test_pixels_that_are_copied_ahead_are_there_before_the_batch_reads_them() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    with fake_uploads(total_memory=10_000) as told:
        upload = copying_device().begin_upload(pixels)
        assert upload is not None
        assert told == ["copy"]
        copied = upload.take()
        assert told == ["copy", "wait for the copy", "keep for the batch"]
        assert copied is not None
        np.testing.assert_array_equal(copied.numpy(), pixels)
        assert upload.take() is None  # a batch that is tried again copies from the host
    assert CpuDevice("cpu").begin_upload(pixels) is None


def test_results_are_read_from_pinned_memory_once_they_are_there() -> None:
    results = torch.arange(12.0).reshape(3, 4)
    with fake_uploads(total_memory=0) as told:
        torch.testing.assert_close(copying_device().download(results), results)
    assert told == ["wait for all"]


def test_pixels_that_wait_on_the_gpu_take_a_small_share_of_its_memory() -> None:
    pixels = np.zeros((10, 10, 3), np.uint8)
    with fake_uploads(total_memory=64 * 700):
        device = copying_device()
        first, second, third = (device.begin_upload(pixels) for _ in range(3))
        assert first is not None
        assert second is not None
        assert third is None
        first.take()
        del second  # its job was cancelled
        assert device.begin_upload(pixels) is not None
        assert device.begin_upload(pixels[:5]) is not None


def test_a_copy_ahead_that_fails_leaves_it_to_the_batch() -> None:
    with fake_uploads(total_memory=10_000), patch.object(torch, "empty", side_effect=torch.OutOfMemoryError):
        assert copying_device().begin_upload(np.zeros((2, 2, 3), np.uint8)) is None


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
