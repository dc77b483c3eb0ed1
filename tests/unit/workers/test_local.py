"""Models in this process: one that is broken does no harm to the others, and a lost device is noticed."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import simplejpeg

from service import pipeline
from service.answers.json import JsonEncoder
from service.batching.queue import RequestQueue
from service.devices.cpu import CpuDevice
from service.errors import InferenceError, ModelStoreError, NotReadyError, OutOfMemoryError, ServiceError
from service.metrics import Observed
from service.settings import Settings
from service.structures import DetectOptions, Encoded, Job, Json, Progress, UInt8Array
from service.workers import local as local_module
from service.workers.local import LocalDetector
from tests.fakes import FAKE_BOXES_INFO, FAKE_INFO, POISON, FakePredictor, load_fakes, picture


def ignore(name: Observed, labels: object, value: float, trace_id: str | None = None) -> None:
    """Nobody wants to know."""


def job(red: int = 100, model: str = "fake@1") -> Job:
    return Job(
        model=model,
        source=Encoded(picture(red=red)),
        options=DetectOptions(),
        form=Json(),
        deadline=time.monotonic() + 3600,
        progress=Progress("body"),
    )


def local(*predictors: FakePredictor, models: tuple[str, ...] = ()) -> LocalDetector:
    return LocalDetector(Settings(device="cpu", models=models), lambda _: iter(predictors), ignore)


def broken() -> FakePredictor:
    return FakePredictor(FAKE_BOXES_INFO, warm_up_error=ModelStoreError("not its weights"))


async def test_model_that_does_not_warm_up_is_left_out_unless_it_was_named() -> None:
    detector = local(broken(), FakePredictor())
    assert [info.key for info in await detector.start()] == ["fake@1"]
    await detector.stop()
    for alone in (local(broken()), local(broken(), FakePredictor(), models=("fake-boxes", "fake"))):
        with pytest.raises(ModelStoreError, match="not its weights"):
            await alone.start()
        await alone.stop()


class Decoding(CpuDevice):
    """A device with a JPEG decoder: the CPU's, with an offset, that counts its calls."""

    def __init__(self, offset: int) -> None:
        super().__init__("cpu")
        self._offset = offset
        self.calls = 0

    def jpeg_decoder(self) -> Callable[[bytes], UInt8Array]:
        return self._decode

    def _decode(self, data: bytes) -> UInt8Array:
        self.calls += 1
        pixels: UInt8Array = simplejpeg.decode_jpeg(data)
        return pixels + np.uint8(self._offset)


def with_device_decoder() -> LocalDetector:
    settings = Settings(device="cpu", jpeg_decoder="cuda")
    return LocalDetector(settings, lambda _: iter([FakePredictor()]), ignore)


async def test_the_devices_jpeg_decoder_is_checked_at_start_and_then_used(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = replace(job(), source=Encoded(simplejpeg.encode_jpeg(np.full((48, 64, 3), 100, np.uint8))))
    for offset, used in ((1, 1), (30, 0)):
        device = Decoding(offset)
        monkeypatch.setattr(local_module, "choose_device", lambda setting, device=device: device)
        detector = with_device_decoder()
        await detector.start()
        assert device.calls == 1
        assert (await detector.run(jpeg)).image_size == (48, 64)
        assert device.calls == 1 + used
        await detector.stop()


async def test_the_devices_jpeg_decoder_is_refused_on_the_cpu() -> None:
    detector = with_device_decoder()
    with pytest.raises(ServiceError, match="jpeg_decoder 'cuda' needs models to run on CUDA; they run on cpu"):
        await detector.start()
    await detector.stop()


async def test_models_come_and_go() -> None:
    detector = LocalDetector(Settings(device="cpu"), load_fakes, ignore)
    await detector.start()
    assert (await detector.load("fake@2")).key == "fake@2"
    await detector.unload("fake@1")
    assert (await detector.run(job(200, "fake@2"))).detections == 2
    with pytest.raises(NotReadyError, match="fake@1"):
        await detector.run(job())
    await detector.stop()


def failure_of(detector: LocalDetector) -> str | None:
    return detector.failure


async def test_failed_batch_is_no_alarm_but_a_device_that_fails_its_probe_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: CpuDevice) -> None:
        raise RuntimeError(f"{device.label} has fallen off the bus")

    monkeypatch.setattr(local_module, "device_named", CpuDevice)
    detector = local(FakePredictor(replace(FAKE_INFO, device="cuda:0")))
    await detector.start()
    with pytest.raises(InferenceError):
        await detector.run(job(POISON))
    assert failure_of(detector) is None
    monkeypatch.setattr(CpuDevice, "probe", fail)
    with pytest.raises(InferenceError):
        await detector.run(job(POISON))
    assert failure_of(detector) == "the device does not answer any more: cuda:0 has fallen off the bus"
    await detector.stop()


async def test_device_whose_thread_has_ended_is_noticed_and_gets_no_more_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("our own mistake")

    detector = local(FakePredictor())
    await detector.start()
    monkeypatch.setattr(RequestQueue, "measure", fail)  # called outside of what is expected to fail
    with pytest.raises(NotReadyError):
        await detector.run(job())
    assert failure_of(detector) == "the device's thread has ended"
    assert not detector.is_alive
    with pytest.raises(RuntimeError, match="thread has ended"):
        detector.probe()
    with pytest.raises(NotReadyError, match="thread has ended"):
        await detector.run(job())
    with pytest.raises(RuntimeError, match="our own mistake"):
        await detector.stop()


@pytest.mark.parametrize(("owner", "function"), [(pipeline, "decode_image"), (JsonEncoder, "encode")])
async def test_thread_that_does_not_come_back_is_a_failure_for_as_long(
    owner: object, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    original = getattr(owner, function)

    def go_on(*args: object, **options: object) -> object:
        may_go_on.wait()
        return original(*args, **options)

    monkeypatch.setattr(owner, function, go_on)
    detector = LocalDetector(Settings(device="cpu", probe_timeout_seconds=0.001), load_fakes, ignore)
    await detector.start()
    running = asyncio.create_task(detector.run(job()))
    while failure_of(detector) is None:
        await asyncio.sleep(0)
    may_go_on.set()
    assert (await running).detections == 1
    while not detector.is_alive:
        await asyncio.sleep(0)
    await detector.stop()


async def test_decoder_that_waits_for_room_is_not_taken_for_hung() -> None:
    predictor = FakePredictor()
    detector = LocalDetector(Settings(device="cpu", max_held_pixels=1), lambda _: iter([predictor]), ignore)
    await detector.start()
    predictor.device_is_free.clear()
    first = asyncio.create_task(detector.run(job()))
    await asyncio.to_thread(predictor.device_is_busy.wait)
    second = asyncio.create_task(detector.run(job()))
    held_pixels = detector.pipeline._held_pixels
    while held_pixels._turn.acquire(blocking=False):  # until the second one waits
        held_pixels._turn.release()
        await asyncio.sleep(0)
    assert detector._decoders.busy_since is None
    predictor.device_is_free.set()
    await asyncio.gather(first, second)
    await detector.stop()


async def test_memory_of_the_cpu_is_what_this_process_has_resident() -> None:
    detector = local(FakePredictor())
    await detector.start()
    assert detector.memory()[("cpu", "resident")] > 10_000_000
    assert detector.busy_seconds == 0
    await detector.stop()


async def test_model_may_come_while_another_thread_asks_the_devices() -> None:
    class Overtaken(FakePredictor):
        def __getattribute__(self, name: str) -> Any:
            if name == "info" and is_started:
                detector._predictors["fake@2"] = FakePredictor()
            return super().__getattribute__(name)

    is_started = False
    detector = local(Overtaken())
    await detector.start()
    is_started = True
    detector.probe()
    assert "fake@2" in detector._predictors
    await detector.stop()


async def test_device_that_is_full_is_not_taken_for_dead_though_it_refuses_the_probe_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(device: CpuDevice) -> None:
        raise RuntimeError(f"{device.label} is out of memory")

    predictor = FakePredictor()
    predictor.memory_pixels = 1
    detector = local(predictor)
    await detector.start()
    monkeypatch.setattr(CpuDevice, "probe", fail)
    with pytest.raises(OutOfMemoryError):
        await detector.run(job())
    assert failure_of(detector) is None
    await detector.stop()


class Memory:
    """What a model holds on its device."""

    held: ClassVar[weakref.WeakSet[Memory]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.held.add(self)


class Heavy(FakePredictor):
    """Holds memory, and fails as it warms up with what a C++ library says."""

    def __init__(self, name: str = "heavy") -> None:
        super().__init__(replace(FAKE_INFO, name=name))
        self.memory = Memory()

    def warm_up(self) -> None:
        held = self.memory
        raise RuntimeError(f"Exception from src/core.cpp:128:\n{held} cannot be had\n" + "at operator()\n" * 99)


def held_memory() -> int:
    gc.collect()
    return len(Memory.held)


async def test_model_that_fails_as_it_warms_up_is_refused_in_a_line_and_gives_its_memory_back() -> None:
    def factory(settings: Settings) -> Iterator[FakePredictor]:
        if settings.models:
            yield Heavy()
        else:
            yield Heavy("first")
            yield FakePredictor()
            yield Heavy("last")

    freed: list[int] = []
    release = CpuDevice.release_memory

    def release_memory(device: CpuDevice) -> None:
        release(device)
        freed.append(held_memory())

    detector = LocalDetector(Settings(device="cpu"), factory, ignore)
    with patch.object(CpuDevice, "release_memory", release_memory):
        assert [info.key for info in await detector.start()] == ["fake@1"]
        with pytest.raises(ModelStoreError) as refusal:
            await detector.load("heavy")
    assert str(refusal.value) == "heavy@1 does not warm up: Exception from src/core.cpp:128:"
    assert freed[0] == freed[-1] == 0
    assert (await detector.run(job())).detections == 1  # the others serve
    await detector.stop()


async def test_unloaded_model_is_gone_before_its_memory_is_given_back() -> None:
    class Held(FakePredictor):
        def __init__(self) -> None:
            super().__init__()
            self.memory = Memory()

    freed: list[int] = []
    detector = LocalDetector(Settings(device="cpu"), lambda _: iter([Held()]), ignore)
    await detector.start()
    await detector.run(job())
    assert held_memory() == 1
    with patch.object(CpuDevice, "release_memory", lambda device: freed.append(held_memory())):
        await detector.unload("fake@1")
    assert freed == [0]
    await detector.stop()


async def test_model_that_is_loaded_is_not_loaded_again() -> None:
    asked: list[tuple[str, ...]] = []

    def factory(settings: Settings) -> Iterator[FakePredictor]:
        asked.append(settings.models)
        return load_fakes(settings)

    detector = LocalDetector(Settings(device="cpu"), factory, ignore)
    await detector.start()
    assert (await detector.load("fake@1")).key == "fake@1"
    assert asked == [()]
    await detector.stop()
