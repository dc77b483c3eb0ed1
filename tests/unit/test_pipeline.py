"""One request's way: every stage is timed, ends at the deadline, and is not begun for nobody."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

import pytest
from prometheus_client import CollectorRegistry

from service.batching.batcher import Batcher
from service.errors import DeadlineExceededError, InvalidImageError, OverloadedError
from service.imaging.decode import ImageLimits
from service.metrics import Metrics
from service.pipeline import Job, Pipeline, Progress, predict_batch
from service.structures import Detections, DetectOptions, Image
from tests.fakes import FakePredictor, picture


class Bench:
    """A pipeline with a fake model."""

    def __init__(self, max_jobs: int = 8) -> None:
        self.metrics = Metrics(CollectorRegistry())
        self.predictor = FakePredictor()
        self.threads = ThreadPoolExecutor(1)
        self.batcher = Batcher(
            partial(predict_batch, metrics=self.metrics),
            max_batch_size=4,
            max_batch_cost=10**9,
            max_queue_size=8,
            max_queue_cost=10**9,
        )
        self.pipeline = Pipeline(
            batcher=self.batcher,
            decoders=self.threads,
            encoders=self.threads,
            image_limits=ImageLimits(max_image_pixels=10_000),
            max_jobs=max_jobs,
            metrics=self.metrics,
        )

    def job(self, data: bytes | None = None, seconds: float = 60.0) -> Job:
        return Job(
            predictor=self.predictor,
            data=picture() if data is None else data,
            options=DetectOptions(),
            deadline=time.monotonic() + seconds,
            progress=Progress("body"),
        )

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Bench]:
    async with bench.batcher:
        try:
            yield bench
        finally:
            bench.predictor.device_is_free.set()
            bench.threads.shutdown()


def count_detections(image: Image, detections: Detections) -> int:
    return len(detections)


async def test_job_is_decoded_predicted_and_encoded_and_each_stage_timed() -> None:
    async with running(Bench()) as bench:
        job = bench.job()
        answer = await bench.pipeline.run(job, count_detections)
    assert (answer.encoded, answer.image_size, answer.batch_size) == (2, (48, 64), 1)
    assert list(job.progress.stage_seconds) == ["body", "decode", "queue", "inference", "encode"]
    assert bench.count("roiserve_images_total", model="fake@1", outcome="ok") == 1


async def test_broken_image_never_reaches_the_batcher() -> None:
    async with running(Bench()) as bench:
        with pytest.raises(InvalidImageError):
            await bench.pipeline.run(bench.job(picture()[:-30]), count_detections)
    assert bench.predictor.batches == []
    assert bench.count("roiserve_images_total", model="fake@1", outcome="invalid_image") == 1


async def test_nothing_is_begun_after_the_deadline() -> None:
    async with running(Bench()) as bench:
        bench.threads.shutdown()  # they would now refuse with another error
        with pytest.raises(DeadlineExceededError) as raised:
            await bench.pipeline.run(bench.job(seconds=0), count_detections)
    assert raised.value.stage == "decode"


async def test_deadline_ends_the_wait_for_a_decoder() -> None:
    async with running(Bench()) as bench:
        gate = threading.Event()
        bench.threads.submit(gate.wait)
        with pytest.raises(DeadlineExceededError) as raised:
            await bench.pipeline.run(bench.job(seconds=0.05), count_detections)
        gate.set()
    assert raised.value.stage == "decode"


async def test_deadline_ends_the_encoding() -> None:
    gate = threading.Event()

    def encode(image: Image, detections: Detections) -> None:
        gate.wait()

    async with running(Bench()) as bench:
        with pytest.raises(DeadlineExceededError) as raised:
            await bench.pipeline.run(bench.job(seconds=0.5), encode)
        gate.set()
    assert raised.value.stage == "encode"


async def test_one_job_too_many_is_refused_before_it_is_decoded() -> None:
    async with running(Bench(max_jobs=1)) as bench:
        bench.predictor.device_is_free.clear()
        first = asyncio.create_task(bench.pipeline.run(bench.job(), count_detections))
        await asyncio.to_thread(bench.predictor.device_is_busy.wait)
        with pytest.raises(OverloadedError) as raised:
            await bench.pipeline.run(bench.job(b"not even looked at"), count_detections)
        bench.predictor.device_is_free.set()
        assert (await first).encoded == 2
        assert (await bench.pipeline.run(bench.job(), count_detections)).encoded == 2
    assert raised.value.retry_after_seconds > 0


async def test_cancelled_job_is_counted_by_its_stage_and_frees_its_place() -> None:
    async with running(Bench(max_jobs=1)) as bench:
        bench.predictor.device_is_free.clear()
        task = asyncio.create_task(bench.pipeline.run(bench.job(), count_detections))
        await asyncio.to_thread(bench.predictor.device_is_busy.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        bench.predictor.device_is_free.set()
        await bench.pipeline.run(bench.job(), count_detections)
    assert bench.count("roiserve_cancelled_total", stage="inference") == 1
    assert bench.count("roiserve_images_total", model="fake@1", outcome="cancelled") == 1


async def test_waiting_images_are_counted_with_their_padded_pixels() -> None:
    async with running(Bench()) as bench:
        bench.predictor.device_is_free.clear()
        first = asyncio.create_task(bench.pipeline.run(bench.job(), count_detections))
        await asyncio.to_thread(bench.predictor.device_is_busy.wait)
        assert bench.pipeline.queue_depth("fake@1") == 0
        second = asyncio.create_task(bench.pipeline.run(bench.job(), count_detections))
        while bench.pipeline.queue_depth("fake@1") == 0:
            await asyncio.sleep(0)
        assert bench.pipeline.queue_pixels("fake@1") == 64 * 64  # 48 x 64 in steps of 32
        assert bench.pipeline.queue_depth("other@1") == 0
        bench.predictor.device_is_free.set()
        await asyncio.gather(first, second)
        assert bench.pipeline.queue_depth("fake@1") == 0


def test_progress_adds_up_a_stage_that_is_entered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a failed batch is tried again, image by image."""
    times: Iterator[float] = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    progress = Progress("queue")
    progress.enter("inference")
    progress.enter("inference")
    progress.enter("encode")
    assert progress.stage_seconds == {"queue": 1.0, "inference": 6.0}
    assert progress.stage == "encode"
