"""On a GPU, every family, engine and precision answers as the CPU does, the kernels are ours, and a model that was
unloaded leaves nothing. Without a GPU the same tests run on the CPU for one family, to show that they work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks._gpu_answers import LEAST_MATCHED, differences
from service.devices import choose_device
from service.imaging.jpeg_check import checked_decoder, fixed_jpeg
from service.inference.loading import load_predictor
from service.inference.predictor import Predictor
from service.metrics import Observed
from service.model_store.store import StoredModel
from service.settings import Settings
from service.structures import Detections, DetectOptions, Job, Json, Pixels, Progress, Query
from service.workers.local import LocalDetector
from service.workers.stored import stored_predictors
from tests.unit.inference.engines.networks import FAMILIES, picture

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
MASKED = "fpn with masks"
PRECISIONS = [one for one in choose_device(DEVICE).precisions if one in LEAST_MATCHED]
CASES = [
    *(("eager", precision, family) for precision in PRECISIONS for family in (FAMILIES if HAS_GPU else [MASKED])),
    # On the CPU they would take minutes of a compiler; there they are tested without code generation.
    *(
        (engine, precision, MASKED)
        for engine in ("compiled", "graphs")
        for precision in (PRECISIONS if HAS_GPU else ())
    ),
]
SIZES = [(120, 200), (97, 61), (160, 160)]
Store = Callable[[str], StoredModel]


def answers(predictor: Predictor, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Detections]:
    given = ((10.0, 10.0, 50.0, 55.0), (20.0, 5.0, 60.0, 60.0)) if predictor.info.needs_proposals else None
    options = DetectOptions(score_thresh=0.0, proposals=given)
    queries = [Query(picture(*size, seed=index), options) for index, size in enumerate(sizes)]
    return [prediction.detections for query in queries for prediction in predictor.predict([query])]


@pytest.mark.parametrize(("engine", "precision", "family"), CASES)
def test_answers_are_the_cpus(engine: str, precision: str, family: str, store: Store, cache_dir: Path) -> None:
    reference = answers(load_predictor(store(family), device="cpu", engine="eager"))
    predictor = load_predictor(store(family), device=DEVICE, engine=engine, precision=precision, cache_dir=cache_dir)
    predictor.warm_up()
    assert (predictor.info.engine, predictor.info.precision) == (engine, precision)
    if (engine, precision) != ("eager", "float32"):
        assert predictor.info.verification is not None
        assert predictor.info.verification.has_passed
    answers(predictor)  # `graphs` records the sizes that it meets again
    matched, of, boxes, scores = differences(reference, answers(predictor))
    assert of >= len(SIZES)
    assert matched >= LEAST_MATCHED[precision] * of
    if precision == "float32":
        assert boxes < 0.01
        assert scores < 1e-3


@pytest.mark.parametrize("policy", ["exact", "bucketed"])
def test_answer_does_not_depend_on_the_batch(policy: str, store: Store) -> None:
    predictor = load_predictor(
        store(MASKED), device=DEVICE, engine="eager", precision="float32", buckets=() if policy == "bucketed" else None
    )
    queries = [Query(picture(64, 90, seed=seed), DetectOptions(score_thresh=0.0)) for seed in range(8)]
    together = [prediction.detections for prediction in predictor.predict(queries)]
    alone = [predictor.predict([query])[0].detections for query in queries]
    matched, of, boxes, scores = differences(alone, together)
    assert matched == of > 0
    assert boxes < 0.01
    assert scores < 1e-3


@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
def test_kernels_on_a_gpu_are_ours() -> None:
    assert choose_device(DEVICE).kernels == "triton"
    assert choose_device(DEVICE).compiler_problem is None


@pytest.mark.skipif(not HAS_GPU, reason="nvJPEG needs a GPU")
def test_nvjpeg_gives_the_cpus_pixels_in_several_threads() -> None:
    decoder = choose_device("cuda").jpeg_decoder()
    assert checked_decoder(decoder) is decoder
    expected = decoder(fixed_jpeg())
    with ThreadPoolExecutor(4) as threads:
        assert all(np.array_equal(pixels, expected) for pixels in threads.map(decoder, [fixed_jpeg()] * 50))


async def test_two_models_serve_beside_each_other_and_one_that_is_unloaded_leaves_nothing(
    store: Store, cache_dir: Path
) -> None:
    first, second = store(MASKED), store("c5")
    settings = Settings(
        device=DEVICE,
        engine="eager",
        model_store=first.path.parent.parent,
        models=(first.key,),
        engine_cache_dir=cache_dir,
    )
    detector = LocalDetector(settings, stored_predictors, nobody_notes)
    await detector.start()
    kept: list[float] = []
    for _ in range(2):
        await detector.load(second.key)
        found = await asyncio.gather(*(detector.run(job(key)) for key in (first.key, second.key) * 3))
        assert all(answer.detections > 0 for answer in found)
        await detector.unload(second.key)
        kept.append(sum(size for (_, kind), size in detector.memory().items() if kind == "allocated"))
    assert (await detector.run(job(first.key))).detections > 0
    await detector.stop()
    assert kept[1] <= kept[0] + 1_000_000  # 0 on the CPU, where nothing is counted as allocated


def nobody_notes(name: Observed, labels: Sequence[str], value: float, trace_id: str | None = None) -> None:
    """An `Observe`."""


def job(model: str) -> Job:
    return Job(
        model=model,
        source=Pixels(picture(120, 200).pixels),
        options=DetectOptions(score_thresh=0.0),
        form=Json(),
        deadline=time.monotonic() + 600,
        progress=Progress("body"),
    )
