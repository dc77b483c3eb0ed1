"""One request's way: every stage is timed, ends at the deadline, and is not begun for nobody."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import orjson
import PIL.Image
import pytest
from prometheus_client import CollectorRegistry

from service import pipeline
from service.answers.array import ArrayEncoder
from service.answers.encoder import never
from service.answers.json import JsonEncoder
from service.batching.batcher import Batcher
from service.batching.held_pixels import HeldPixels
from service.errors import (
    AnswerTooLargeError,
    DeadlineExceededError,
    InvalidImageError,
    NotReadyError,
    OutOfMemoryError,
    TooLargeError,
)
from service.imaging import decode
from service.imaging.decode import ImageLimits
from service.metrics import Metrics
from service.pipeline import Pipeline, ThreadTask, WholeImage, Work, run_batch
from service.structures import (
    Cvat,
    Detections,
    DetectOptions,
    Drawing,
    Encoded,
    Float32Array,
    Form,
    HuggingFace,
    Image,
    Job,
    Json,
    LabelStudio,
    LabelStudioTag,
    Pixels,
    Prediction,
    Progress,
    Query,
    Tensors,
)
from service.tensors import read_tensors
from tests.fakes import FakePredictor, picture


class Bench:
    """A pipeline with a fake model."""

    def __init__(
        self, *, batch_policy: Literal["exact", "bucketed", "padded"] = "exact", max_held_pixels: int = 10**9
    ) -> None:
        self.metrics = Metrics(CollectorRegistry())
        self.predictor = FakePredictor()
        self.threads = ThreadPoolExecutor(1)
        self.encoders = ThreadPoolExecutor(1)
        self.held_pixels = HeldPixels(max_held_pixels)
        self.batcher: Batcher[Work | ThreadTask, Prediction | None] = Batcher(
            partial(run_batch, observe=self.metrics.observe),
            max_batch_size=4,
            max_batch_cost=10**9,
            max_queue_size=8,
            max_queue_cost=10**9,
        )
        self.pipeline = Pipeline(
            batcher=self.batcher,
            decoders=self.threads,
            encoders=self.encoders,
            image_limits=ImageLimits(max_image_pixels=10_000),
            held_pixels=self.held_pixels,
            predictors={self.predictor.info.key: self.predictor},
            observe=self.metrics.observe,
            batch_policy=batch_policy,
        )

    def job(self, source: bytes | Pixels | None = None, seconds: float = 60.0, *, form: Form | None = None) -> Job:
        return Job(
            model="fake@1",
            source=source if isinstance(source, Pixels) else Encoded(source or picture()),
            options=DetectOptions(),
            form=form or Json(),
            deadline=time.monotonic() + seconds,
            progress=Progress("body"),
        )

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def objects(boxes: Float32Array, masks: Float32Array) -> Detections:
    return Detections(boxes, np.ones(len(boxes), np.int64), np.linspace(1, 0.1, len(boxes), dtype=np.float32), masks)


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Bench]:
    async with bench.batcher:
        try:
            yield bench
        finally:
            bench.predictor.device_is_free.set()
            bench.threads.shutdown()
            bench.encoders.shutdown()


async def test_job_is_decoded_predicted_and_encoded_and_each_stage_timed() -> None:
    async with running(Bench()) as bench:
        job = bench.job()
        answer = await bench.pipeline.run(job)
    assert [found["label"] for found in orjson.loads(answer.encoded)] == ["cat", "dog"]
    assert (answer.detections, answer.image_size, answer.batch_size) == (2, (48, 64), 1)
    assert list(job.progress.stage_seconds) == ["body", "decode", "queue", "inference", "encode"]
    for stage in ("decode", "queue", "backbone", "encode"):
        assert bench.count("roiserve_stage_duration_seconds_count", stage=stage, model="fake@1") == 1


@pytest.mark.parametrize("what", ["overflowed", "uncompiled"])
async def test_batch_that_did_not_run_as_it_should_is_counted_once(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    predict = bench.predictor.predict
    metric = f"roiserve_{what}_batches_total"

    def misbehave(queries: Sequence[Query]) -> list[Prediction]:
        return [
            replace(prediction, overflowed=what == "overflowed", uncompiled=what == "uncompiled")
            for prediction in predict(queries)
        ]

    async with running(bench):
        await bench.pipeline.run(bench.job())
        assert bench.count(metric, model="fake@1") == 0
        monkeypatch.setattr(bench.predictor, "predict", misbehave)
        await bench.pipeline.run(bench.job())
    assert bench.count(metric, model="fake@1") == 1


async def test_detections_are_drawn_if_a_picture_is_wanted() -> None:
    async with running(Bench()) as bench:
        answer = await bench.pipeline.run(bench.job(form=Drawing("image/jpeg")))
    assert PIL.Image.open(io.BytesIO(answer.encoded)).format == "JPEG"


async def test_many_large_masks_are_encoded_by_several_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two threads waits until the other has begun too. Sides of 50 x (400 + 500) pixels make two parts."""
    rng = np.random.default_rng(0)
    image = Image(np.zeros((600, 800, 3), np.uint8))
    boxes = np.tile(np.array([100, 50, 500, 550], np.float32), (50, 1))
    found = objects(boxes, rng.random((50, 28, 28), np.float32))
    both = threading.Barrier(2)
    bench = Bench()
    [elements] = JsonEncoder(Json("rle")).encode(image, found, bench.predictor.info, should_stop=never)
    begun: list[int] = []

    class InCompany(JsonEncoder):
        def encode(self, image: Image, part: Detections, *args: Any, **options: Any) -> Iterator[bytes]:
            begun.append(len(part))
            if len(begun) <= 2:
                both.wait(60)
            return super().encode(image, part, *args, **options)

    monkeypatch.setattr(pipeline, "encoder_for", InCompany)
    with ThreadPoolExecutor(2) as bench.pipeline._encoders, bench.held_pixels.hold() as holding:
        assert await bench.pipeline._encode(bench.job(form=Json("rle")), image, found, holding) == b"[%s]" % elements
    assert len(begun) == 2


@pytest.mark.parametrize(("size", "is_large"), [((3, 40), True), ((3, 4), False)])
async def test_large_images_are_decoded_and_drawn_in_the_background(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], is_large: bool
) -> None:
    monkeypatch.setattr(pipeline, "_LARGE_PIXELS", 100)
    bench = Bench()
    with ThreadPoolExecutor(1, "background") as background, bench.held_pixels.hold() as holding:
        bench.pipeline._background = background
        threads: list[str] = []

        def named_image(*args: Any) -> Image:
            threads.append(threading.current_thread().name)
            return Image(*args)

        monkeypatch.setattr(pipeline, "Image", named_image)
        source = Pixels(np.zeros((*size, 3), np.uint8))
        image = await bench.pipeline._decoded(bench.job(source), holding, bench.predictor)
        assert image.size == size
        assert [name.startswith("background") for name in threads] == [is_large]
        none = objects(np.zeros((0, 4), np.float32), np.zeros((0, 28, 28), np.float32))
        begun: list[str] = []

        class Named(JsonEncoder):
            def encode(self, *args: Any, **options: Any) -> Iterator[bytes]:
                begun.append(threading.current_thread().name)
                return iter(())

        monkeypatch.setattr(pipeline, "encoder_for", lambda form: Named(Json()))
        await bench.pipeline._encode(bench.job(form=Drawing()), image, none, holding)
        assert [name.startswith("background") for name in begun] == [is_large]


async def test_long_answers_are_encoded_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    image, found = many_masks(3)
    bench = Bench()
    begun: list[str] = []

    class Named(JsonEncoder):
        def encode(self, *args: Any, **options: Any) -> Iterator[bytes]:
            begun.append(threading.current_thread().name)
            return super().encode(*args, **options)

    monkeypatch.setattr(pipeline, "encoder_for", Named)
    with ThreadPoolExecutor(2, "background") as background, bench.held_pixels.hold() as holding:
        bench.pipeline._background = background
        await bench.pipeline._encode(bench.job(form=Json("rle")), image, found, holding)
        assert len(begun) == 3
        assert all(name.startswith("background") for name in begun)
        begun.clear()
        await bench.pipeline._encode(bench.job(form=Json("rle")), image, found[:2], holding)
        assert not any(name.startswith("background") for name in begun)


def many_masks(number: int = 40) -> tuple[Image, Detections]:
    """Each so large that it is a part of its own."""
    image = Image(np.zeros((20_000, 20_000, 3), np.uint8))
    boxes = np.tile(np.array([0, 0, 20_000, 20_000], np.float32), (number, 1))
    return image, objects(boxes, np.ones((number, 28, 28), np.float32))


@pytest.mark.parametrize(
    ("form", "advice"),
    [
        (Json("png"), "masks=crop or masks=rle"),
        (Json("polygons"), "masks=rle"),
        (Json("rle"), "none"),
        (HuggingFace(with_masks=True), "object-detection"),
        (Cvat(with_masks=True), "the function for boxes"),
        (
            LabelStudio("fake@1", (LabelStudioTag("brushlabels", "brush", "image", ("cat", "dog"), 0.05),)),
            "RectangleLabels",
        ),
    ],
)
async def test_answer_that_would_be_too_large_is_refused_and_told_what_is_smaller(
    form: Form, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    written: list[int] = []
    encode = ArrayEncoder.encode

    def count(encoder: ArrayEncoder, image: Image, part: Detections, *args: Any, **options: Any) -> Iterator[bytes]:
        encoded.append(len(part))
        for piece in encode(encoder, image, part, *args, **options):
            written.append(len(piece))
            yield piece

    monkeypatch.setattr(ArrayEncoder, "encode", count)
    bench = Bench()
    bench.pipeline._max_answer_bytes = 1000
    image, found = many_masks()
    with (
        ThreadPoolExecutor(1) as bench.pipeline._encoders,
        bench.held_pixels.hold() as holding,
        pytest.raises(AnswerTooLargeError, match=f"more than 1000 bytes; ask for .*{advice}"),
    ):
        await bench.pipeline._encode(bench.job(form=form), image, found, holding)
    # A PNG has a size that is known beforehand; of the others no more is encoded than what was too much.
    is_known = form in (Json("png"), HuggingFace(with_masks=True))
    assert sum(encoded) == 0 if is_known else 1 <= sum(encoded) < 40
    # A bitmap, of 800 MB each here, is not written to its end, nor is any of the few that were begun.
    assert sum(written) < 5_000_000


async def test_encoding_stops_when_its_caller_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_go_on = threading.Event(), threading.Event()
    parts: list[int] = []

    def encode(encoder: JsonEncoder, image: Image, part: Detections, *args: Any, **options: Any) -> Iterator[bytes]:
        parts.append(len(part))
        begun.set()
        may_go_on.wait()
        return iter([b"{}"])

    monkeypatch.setattr(JsonEncoder, "encode", encode)
    bench = Bench()
    image, found = many_masks()
    with ThreadPoolExecutor(1) as bench.pipeline._encoders, bench.held_pixels.hold() as holding:
        running = asyncio.create_task(bench.pipeline._encode(bench.job(form=Json("rle")), image, found, holding))
        await asyncio.to_thread(begun.wait)
        running.cancel()
        await asyncio.wait([running])
        may_go_on.set()
    assert parts == [1]


async def test_small_answer_does_not_wait_for_all_of_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread: what comes while the first part is encoded waits for a few others and not for all forty."""
    begun, may_go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def encode(encoder: JsonEncoder, image: Image, part: Detections, *args: Any, **options: Any) -> Iterator[bytes]:
        order.append("large" if image.width == 10_000 else "small")
        begun.set()
        may_go_on.wait()
        return iter([b"{}"])

    monkeypatch.setattr(JsonEncoder, "encode", encode)
    bench = Bench()
    image, found = many_masks()
    small = Image(np.zeros((10, 10, 3), np.uint8))
    with ThreadPoolExecutor(1) as bench.pipeline._encoders, bench.held_pixels.hold() as holding:
        large = asyncio.create_task(bench.pipeline._encode(bench.job(form=Json("rle")), image, found, holding))
        await asyncio.to_thread(begun.wait)
        other = asyncio.create_task(bench.pipeline._encode(bench.job(form=Json("rle")), small, found[:1], holding))
        await asyncio.sleep(0)
        may_go_on.set()
        await asyncio.gather(large, other)
    assert order.index("small") <= 5


async def test_pixels_are_taken_as_they_are() -> None:
    pixels = np.full((48, 64, 3), (200, 0, 0), np.uint8)
    async with running(Bench()) as bench:
        sent, encoded = await asyncio.gather(
            bench.pipeline.run(bench.job(Pixels(pixels))), bench.pipeline.run(bench.job(picture(red=200)))
        )
        with pytest.raises(TooLargeError, match="200 x 100 pixels"):
            await bench.pipeline.run(bench.job(Pixels(np.zeros((100, 200, 3), np.uint8))))
    assert sent.encoded == encoded.encoded


async def test_pixels_are_on_their_way_to_the_device_before_their_image_is_queued() -> None:
    """So that neither the batch nor the thread that launches its work waits for the copy."""

    class Copy:
        def take(self) -> None:
            return None

    seen: list[object] = []

    class Predictor(FakePredictor):
        def begin_upload(self, image: Image) -> Image:
            seen.append(threading.current_thread())
            return replace(image, upload=Copy())

        def predict(self, queries: Sequence[Query]) -> list[Prediction]:
            seen.extend(type(query.image.upload) for query in queries)
            return super().predict(queries)

    bench = Bench()
    predictor = Predictor()
    bench.pipeline._predictors = {predictor.info.key: predictor}
    async with running(bench):
        decoder = await asyncio.wrap_future(bench.threads.submit(threading.current_thread))
        await bench.pipeline.run(bench.job())
    assert seen == [decoder, Copy]


async def test_detections_leave_as_tensors() -> None:
    async with running(Bench()) as bench:
        answer = await bench.pipeline.run(bench.job(form=Tensors()))
    arrays = read_tensors(answer.encoded)
    assert arrays["labels"].tolist() == [1, 2]
    assert arrays["masks"].shape == (2, 28, 28)


@dataclass(frozen=True)
class Halves:
    """A plan: the left half of an image and the right one."""

    job: Job

    def split(self, image: Image) -> list[Query]:
        middle = image.width // 2
        halves = (image.pixels[:, :middle], image.pixels[:, middle:])
        return [Query(Image(np.ascontiguousarray(half)), self.job.options) for half in halves]

    def merge(self, image: Image, predictions: Sequence[Prediction]) -> Prediction:
        left, right = (prediction.detections.arrays() for prediction in predictions)
        right["boxes"] = right["boxes"] + np.array([image.width // 2, 0] * 2, np.float32)
        both = Detections.of({name: np.concatenate([left[name], right[name]]) for name in left})
        return replace(predictions[0], detections=both)


async def test_plan_makes_several_entries_of_an_image_and_one_answer_of_theirs() -> None:
    async with running(Bench()) as bench:
        bench.pipeline._plan_for = Halves
        answer = await bench.pipeline.run(bench.job())
        found = orjson.loads(answer.encoded)
    assert [one["box"] for one in found if one["label"] == "cat"] == [[0, 0, 16, 48], [32, 0, 48, 48]]
    assert (answer.detections, answer.image_size) == (4, (48, 64))
    assert sum(bench.predictor.batches) == 2


@dataclass(frozen=True)
class Columns(Halves):
    """A plan: each column of pixels by itself."""

    def split(self, image: Image) -> list[Query]:
        return [Query(Image(image.pixels[:, [x]]), self.job.options) for x in range(image.width)]

    def merge(self, image: Image, predictions: Sequence[Prediction]) -> Prediction:
        assert len(predictions) == image.width
        return predictions[0]


@pytest.mark.parametrize("entries", [1, 3, 8])
async def test_image_never_has_more_entries_in_the_queue_than_places(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is answered, though there is no room for 64, and another image does not wait for all of them."""
    widths: list[int] = []
    async with running(Bench()) as bench:
        predict = bench.predictor.predict

        def noted(queries: Sequence[Query]) -> list[Prediction]:
            widths.extend(query.image.width for query in queries)
            return predict(queries)

        monkeypatch.setattr(bench.predictor, "predict", noted)
        bench.predictor.device_is_free.clear()
        bench.pipeline._plan_for = Columns
        large = asyncio.create_task(bench.pipeline.run(replace(bench.job(), entries=entries)))
        await asyncio.to_thread(bench.predictor.device_is_busy.wait)
        assert len(bench.pipeline.waiting_pixels("fake@1")) == entries - len(widths)
        bench.pipeline._plan_for = WholeImage
        # Of the other priority, in which there is room whatever this one holds.
        other = asyncio.create_task(bench.pipeline.run(replace(bench.job(), is_bulk=True)))
        while len(bench.pipeline.waiting_pixels("fake@1")) == entries - len(widths):
            await asyncio.sleep(0)
        bench.predictor.device_is_free.set()
        await asyncio.gather(large, other)
    assert sorted(widths) == [1] * 64 + [64]
    assert widths.index(64) < 40


async def test_images_of_a_batch_request_that_are_being_decoded_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread decodes them one after the other, and the device is free."""
    monkeypatch.setattr(pipeline, "_MATES_SECONDS", 30)
    async with running(Bench()) as bench:
        jobs = [replace(bench.job(), is_bulk=True) for _ in range(3)]
        answers = await asyncio.gather(*map(bench.pipeline.run, jobs))
        assert [answer.batch_size for answer in answers] == [3, 3, 3]
        alone = await bench.pipeline.run(replace(bench.job(), is_bulk=True))
        assert alone.batch_size == 1


async def test_job_for_a_model_that_is_gone_is_told_so() -> None:
    async with running(Bench()) as bench:
        with pytest.raises(NotReadyError, match="other@1"):
            await bench.pipeline.run(replace(bench.job(), model="other@1"))


async def test_broken_image_never_reaches_the_batcher() -> None:
    async with running(Bench()) as bench:
        with pytest.raises(InvalidImageError):
            await bench.pipeline.run(bench.job(picture()[:-30]))
    assert bench.predictor.batches == []


async def test_nothing_is_begun_after_the_deadline() -> None:
    async with running(Bench()) as bench:
        bench.threads.shutdown()  # they would now refuse with another error
        with pytest.raises(DeadlineExceededError) as raised:
            await bench.pipeline.run(bench.job(seconds=0))
    assert raised.value.stage == "decode"


async def test_deadline_ends_the_wait_for_a_decoder() -> None:
    async with running(Bench()) as bench:
        gate = threading.Event()
        bench.threads.submit(gate.wait)
        with pytest.raises(DeadlineExceededError) as raised:
            await bench.pipeline.run(bench.job(seconds=0.05))
        gate.set()
    assert raised.value.stage == "decode"


async def test_deadline_ends_the_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(JsonEncoder, "encode", lambda *_, **__: gate.wait())
    async with running(Bench()) as bench:
        with pytest.raises(DeadlineExceededError) as raised:
            await bench.pipeline.run(bench.job(seconds=0.5))
        gate.set()
    assert raised.value.stage == "encode"


async def test_task_runs_on_the_devices_thread_and_its_error_comes_back_as_it_was() -> None:
    def name_thread() -> None:
        raise ValueError(threading.current_thread().name)

    async with running(Bench()) as bench:
        with pytest.raises(ValueError, match="batcher"):
            await bench.pipeline.run_on_device_thread(name_thread)
        assert (await bench.pipeline.run(bench.job())).detections == 2


async def test_time_of_a_task_says_nothing_about_images() -> None:
    """A warm-up of seconds counts as one pixel: at that rate an image would take days."""
    async with running(Bench()) as bench:
        await bench.pipeline.run_on_device_thread(lambda: time.sleep(0.05))
        answers = await asyncio.gather(*(bench.pipeline.run(bench.job()) for _ in range(8)))
        assert [answer.detections for answer in answers] == [2] * 8


async def test_waiting_images_are_counted_with_their_padded_pixels() -> None:
    async with running(Bench()) as bench:
        bench.predictor.device_is_free.clear()
        first = asyncio.create_task(bench.pipeline.run(bench.job()))
        await asyncio.to_thread(bench.predictor.device_is_busy.wait)
        assert bench.pipeline.waiting_pixels("fake@1") == []
        second = asyncio.create_task(bench.pipeline.run(bench.job()))
        while not bench.pipeline.waiting_pixels("fake@1"):
            await asyncio.sleep(0)
        assert bench.pipeline.waiting_pixels("fake@1") == [64 * 64]  # 48 x 64 in steps of 32
        assert bench.pipeline.waiting_pixels("other@1") == []
        bench.predictor.device_is_free.set()
        await asyncio.gather(first, second)
        assert bench.pipeline.waiting_pixels("fake@1") == []


@pytest.mark.parametrize(("policy", "batches"), [("exact", [1, 1]), ("bucketed", [1, 1]), ("padded", [2])])
async def test_policy_says_whether_images_of_two_sizes_share_a_batch(
    policy: Literal["exact", "bucketed", "padded"], batches: list[int]
) -> None:
    async with running(Bench(batch_policy=policy)) as bench:
        jobs = [bench.job(picture(height=height)) for height in (32, 64)]
        bench.predictor.device_is_free.clear()
        held = asyncio.create_task(bench.pipeline.run_on_device_thread(bench.predictor.device_is_free.wait))
        running_jobs = [asyncio.create_task(bench.pipeline.run(job)) for job in jobs]
        while len(bench.pipeline.waiting_pixels("fake@1")) < len(jobs):
            await asyncio.sleep(0)
        bench.predictor.device_is_free.set()
        await asyncio.gather(held, *running_jobs)
        assert bench.predictor.batches == batches


async def test_image_is_not_decoded_before_there_is_room_for_its_pixels() -> None:
    async with running(Bench(max_held_pixels=64 * 48)) as bench:
        bench.predictor.device_is_free.clear()
        first = asyncio.create_task(bench.pipeline.run(bench.job()))
        await asyncio.to_thread(bench.predictor.device_is_busy.wait)
        job = bench.job()
        second = asyncio.create_task(bench.pipeline.run(job))
        while bench.held_pixels._turn.acquire(blocking=False):  # until the decoder waits for its turn
            bench.held_pixels._turn.release()
            await asyncio.sleep(0)
        assert (job.progress.stage, bench.held_pixels.size) == ("decode", 64 * 48)
        bench.predictor.device_is_free.set()
        await asyncio.gather(first, second)
    assert bench.held_pixels.size == 0


class Watched(Progress):
    """Counts the threads at work, as a worker process reports them."""

    def __init__(self) -> None:
        super().__init__("body")
        self.threads = 0

    def _mark(self, stage: str | None, change: int, *, at_once: bool = False) -> None:
        self.threads += change


async def test_job_is_at_risk_from_before_its_header_is_read_and_while_it_is_worked_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spy(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            seen.append((name, progress.threads))
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    seen: list[tuple[str, int]] = []
    progress = Watched()
    spy(decode, "read_container")
    spy(JsonEncoder, "encode")
    async with running(Bench()) as bench:
        spy(bench.predictor, "predict")
        await bench.pipeline.run(replace(bench.job(), progress=progress))
        assert (seen, progress.threads) == ([("read_container", 1), ("predict", 1), ("encode", 1)], 0)
        with pytest.raises(InvalidImageError):
            await bench.pipeline.run(replace(bench.job(picture()[:-30]), progress=progress))
        assert progress.threads == 0


async def test_job_is_not_at_risk_while_it_waits_for_room() -> None:
    async with running(Bench(max_held_pixels=64 * 48)) as bench:
        bench.predictor.device_is_free.clear()
        first = asyncio.create_task(bench.pipeline.run(bench.job()))
        await asyncio.to_thread(bench.predictor.device_is_busy.wait)
        progress = Watched()
        second = asyncio.create_task(bench.pipeline.run(replace(bench.job(), progress=progress)))
        while bench.held_pixels._turn.acquire(blocking=False):  # until the decoder waits for its turn
            bench.held_pixels._turn.release()
            await asyncio.sleep(0)
        assert progress.threads == 0
        bench.predictor.device_is_free.set()
        await asyncio.gather(first, second)


async def test_decoder_that_waits_for_room_is_freed_when_its_caller_goes() -> None:
    async with running(Bench(max_held_pixels=64 * 48)) as bench:
        bench.predictor.device_is_free.clear()
        first = asyncio.create_task(bench.pipeline.run(bench.job()))
        await asyncio.to_thread(bench.predictor.device_is_busy.wait)
        with pytest.raises(DeadlineExceededError, match="'decode'"):
            await bench.pipeline.run(bench.job(seconds=0.05))
        await asyncio.get_running_loop().run_in_executor(bench.threads, int)  # the only thread takes new work
        bench.predictor.device_is_free.set()
        await first
    assert bench.held_pixels.size == 0


async def test_lack_of_memory_while_encoding_is_no_error_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    def lack_memory(*args: object, **options: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(JsonEncoder, "encode", lack_memory)
    async with running(Bench()) as bench:
        with pytest.raises(OutOfMemoryError, match="encode"):
            await bench.pipeline.run(bench.job())


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
