"""The policy `bucketed`: more pictures share a batch, and no answer depends on which."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from service.inference.loading import load_predictor
from service.inference.predictor import Predictor
from service.metrics import Observed
from service.model_store.store import StoredModel
from service.settings import Settings
from service.structures import Detections, DetectOptions, Job, Json, Pixels, Progress, Query
from service.workers.local import LocalDetector
from service.workers.stored import stored_predictors
from tests.tiny_models import store_untrained
from tests.unit.inference.engines.networks import config_of, picture

_SMALL = config_of("fpn with masks")
_TRANSFORM = _SMALL.transform.model_copy(update={"min_size": 128, "max_size": 224})
CONFIG = _SMALL.model_copy(update={"transform": _TRANSFORM})
# (height, width): padded as little as possible, three of 128 x 160 and five of 128 x 192, which is the bucket of all.
SIZES = [(128, 135), (128, 150), (64, 80), (128, 165), (100, 140), (64, 95), (256, 380), (128, 192)]
# Each of a size of its own; the first two share the bucket 192 x 128.
OTHERS = [(192, 128), (140, 128), (128, 128), (128, 224)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredModel:
    return store_untrained(tmp_path_factory.mktemp("store"), "small", CONFIG)


def answers(predictor: Predictor, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
    queries = [Query(picture(*size, seed=index), DetectOptions(score_thresh=0.0)) for index, size in enumerate(sizes)]
    return [prediction.detections for prediction in predictor.predict(queries)]


@pytest.mark.parametrize("engine", ["eager", "openvino"])
def test_answer_does_not_depend_on_the_batch(engine: str, stored: StoredModel, tmp_path: Path) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    predictor = load_predictor(stored, device="cpu", engine=engine, cache_dir=tmp_path, buckets=())
    assert {predictor.group_key(size) for size in SIZES} == {(128, 192)}
    together = answers(predictor, SIZES)
    for index, (size, among) in enumerate(zip(SIZES, together, strict=True)):
        (prediction,) = predictor.predict([Query(picture(*size, seed=index), DetectOptions(score_thresh=0.0))])
        alone = prediction.detections
        assert len(alone) == len(among) >= 10
        np.testing.assert_allclose(among.scores, alone.scores, atol=1e-4)
        np.testing.assert_allclose(among.boxes, alone.boxes, atol=1e-3 * min(size) / 128)
        assert alone.masks is not None
        assert among.masks is not None
        np.testing.assert_allclose(among.masks, alone.masks, atol=1e-3)
        height, width = predictor._model.transform.resized_size(size)
        assert prediction.padding_ratio == pytest.approx(1 - height * width / (128 * 192))


def test_every_bucket_that_a_picture_may_need_is_warmed_up(stored: StoredModel) -> None:
    buckets = ((128, 192), (180, 128), (4000, 4000))
    predictor = load_predictor(stored, device="cpu", engine="eager", buckets=buckets)
    with patch.object(predictor, "predict", wraps=predictor.predict) as predict:
        predictor.warm_up()
    seen = {predictor.group_key(call.args[0][0].image.size) for call in predict.call_args_list}
    assert seen == {(128, 192), (192, 128)}


async def test_pictures_of_many_sizes_fill_batches_that_exact_splits(stored: StoredModel) -> None:
    """Counted in a whole worker: eight sizes of one shape, and four of others."""
    sizes = SIZES + OTHERS
    exact = await batches_of(stored, sizes, batch_policy="exact")
    bucketed = await batches_of(stored, sizes, batch_policy="bucketed")
    named = await batches_of(stored, sizes, batch_policy="bucketed", bucket_sizes="224x224")
    assert sum(exact) == sum(bucketed) == sum(named) == len(sizes)
    assert (len(exact), len(bucketed), len(named)) == (6, 4, 2)
    assert max(bucketed) == 8


async def batches_of(stored: StoredModel, sizes: Sequence[tuple[int, int]], **settings: str) -> list[float]:
    """How many images each batch had, when all of them wait for the device at once."""
    batches: list[float] = []

    def observe(name: Observed, labels: Sequence[str], value: float, trace_id: str | None = None) -> None:
        if name == "batch_size":
            batches.append(value)

    chosen = Settings(device="cpu", engine="eager", model_store=stored.path.parent.parent, **settings)  # type: ignore[arg-type]  # as in variables
    detector = LocalDetector(chosen, stored_predictors, observe)
    await detector.start()
    may_begin = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold() -> None:
        asyncio.run_coroutine_threadsafe(may_begin.wait(), loop).result()

    held = asyncio.create_task(detector.pipeline.run_on_device_thread(hold))
    jobs = [asyncio.create_task(detector.run(job(size))) for size in sizes]
    while len(detector.waiting_pixels("small@1")) < len(sizes):
        await asyncio.sleep(0.01)
    may_begin.set()
    await asyncio.gather(held, *jobs)
    await detector.stop()
    return batches


def job(size: tuple[int, int]) -> Job:
    return Job(
        model="small@1",
        source=Pixels(picture(*size).pixels),
        options=DetectOptions(),
        form=Json(),
        deadline=time.monotonic() + 600,
        progress=Progress("body"),
    )
