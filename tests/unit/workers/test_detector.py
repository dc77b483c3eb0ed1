"""The way to a detector: bounded, and what became of each job is counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from service.batching.backlog import Backlog
from service.errors import (
    InferenceError,
    InvalidImageError,
    NotReadyError,
    OverloadedError,
    PoisonousImageError,
    ServiceError,
    TooLargeError,
)
from service.metrics import Metrics
from service.settings import Settings
from service.structures import DetectOptions, Encoded, Job, Json, Progress
from service.workers.detector import Admission
from service.workers.local import LocalDetector
from tests.fakes import FakePredictor, picture


def job(data: bytes, *, is_bulk: bool = False) -> Job:
    return Job(
        model="fake@1",
        source=Encoded(data),
        options=DetectOptions(),
        form=Json(),
        deadline=time.monotonic() + 60,
        progress=Progress("body"),
        is_bulk=is_bulk,
    )


class Bench:
    """The way to a fake model in this process, for two jobs at a time."""

    def __init__(self) -> None:
        self.predictor = FakePredictor()
        self.metrics = Metrics(CollectorRegistry())
        settings = Settings(max_queue_size=1, max_batch_size=1, device="cpu")
        self.detector = LocalDetector(settings, lambda _: iter([self.predictor]), self.metrics.observe)
        self.admission = Admission(self.detector, metrics=self.metrics)

    def submit(self, data: bytes | None = None, *, is_bulk: bool = False, entries: int = 1) -> asyncio.Task[object]:
        asked = replace(job(picture() if data is None else data, is_bulk=is_bulk), entries=entries)
        return asyncio.create_task(self.admission.run(asked))

    def images(self, outcome: str) -> float | None:
        labels = {"model": "fake@1", "outcome": outcome}
        return self.metrics.registry.get_sample_value("roiserve_images_total", labels)


@asynccontextmanager
async def running() -> AsyncIterator[Bench]:
    bench = Bench()
    await bench.detector.start()
    try:
        yield bench
    finally:
        bench.predictor.device_is_free.set()
        await bench.detector.stop()


async def test_one_job_too_many_is_refused_before_it_is_looked_at() -> None:
    async with running() as bench:
        bench.predictor.device_is_free.clear()
        admitted = [bench.submit(), bench.submit()]
        await asyncio.to_thread(bench.predictor.device_is_busy.wait)
        with pytest.raises(OverloadedError, match="at most 2") as raised:
            await bench.submit(b"not even looked at")
        assert raised.value.retry_after_seconds > 0
        bench.predictor.device_is_free.set()
        await asyncio.gather(*admitted)
        await bench.submit()
        assert (bench.images("ok"), bench.images("overloaded")) == (3, 1)


async def test_places_count_the_entries_that_are_made_of_an_image() -> None:
    async with running() as bench:
        bench.predictor.device_is_free.clear()
        large = bench.submit(entries=2)
        await asyncio.to_thread(bench.predictor.device_is_busy.wait)
        with pytest.raises(OverloadedError, match="2 images wait or are under way, at most 2"):
            await bench.submit()
        bench.predictor.device_is_free.set()
        await large
        bench.predictor.device_is_free.clear()
        small = bench.submit()
        with pytest.raises(OverloadedError, match="at most 2"):
            await asyncio.gather(bench.submit(entries=2))
        bench.predictor.device_is_free.set()
        await small


def test_likely_pixels_grow_with_the_entries() -> None:
    large, small = job(bytes(10_000_000)), job(b"")
    assert replace(large, entries=3).likely_pixels == 3 * large.likely_pixels
    assert replace(small, entries=3).likely_pixels == 3 * small.likely_pixels


@pytest.mark.parametrize("is_bulk", [False, True])
async def test_jobs_of_one_priority_leave_the_others_their_places(is_bulk: bool) -> None:
    async with running() as bench:
        bench.predictor.device_is_free.clear()
        many = [bench.submit(is_bulk=is_bulk) for _ in range(2)]
        await asyncio.to_thread(bench.predictor.device_is_busy.wait)
        with pytest.raises(OverloadedError):
            await bench.submit(is_bulk=is_bulk)
        others = [bench.submit(is_bulk=not is_bulk) for _ in range(2)]
        await asyncio.sleep(0)
        bench.predictor.device_is_free.set()
        await asyncio.gather(*many, *others)


async def test_cancelled_job_is_counted_by_its_stage_and_frees_its_place() -> None:
    async with running() as bench:
        bench.predictor.device_is_free.clear()
        tasks = [bench.submit(), bench.submit()]
        await asyncio.to_thread(bench.predictor.device_is_busy.wait)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        bench.predictor.device_is_free.set()
        await bench.submit()
        assert bench.metrics.registry.get_sample_value("roiserve_cancelled_total", {"stage": "inference"}) == 1
        assert (bench.images("ok"), bench.images("cancelled")) == (1, 2)


async def test_errors_are_counted_by_their_code() -> None:
    async with running() as bench:
        with pytest.raises(InvalidImageError):
            await bench.submit(picture()[:-30])
        assert bench.images("invalid_image") == 1


@pytest.mark.parametrize(
    "error",
    [
        PoisonousImageError("convicted"),
        NotReadyError("no worker can be started"),
        InvalidImageError("refused in a millisecond"),
        TooLargeError("likewise"),
        InferenceError("failed"),
    ],
)
async def test_time_of_a_refusal_or_a_failure_is_no_measure_of_the_device(
    error: ServiceError, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: Job) -> None:
        raise error

    async with running() as bench:
        measured = bench.admission._backlogs[False].seconds_until_done(10**6)
        monkeypatch.setattr(bench.detector, "run", fail)
        with pytest.raises(type(error)):
            await bench.submit()
        assert bench.admission._backlogs[False].seconds_until_done(10**6) == measured


def test_after_tiny_images_a_large_one_finds_a_place_beside_another() -> None:
    """They take as long as the network does, whatever their bytes promise."""
    tiny, large = job(bytes(69)).likely_pixels, job(bytes(2_000_000)).likely_pixels
    now = 0.0
    backlog = Backlog(clock=lambda: now)
    for _ in range(20):
        backlog.add(tiny)
        now += 0.1
        backlog.remove(tiny, work=tiny)
    backlog.add(tiny)
    assert backlog.is_in_time(large, seconds_left=30)
