"""The supervisor with real worker processes and a fake model: whatever happens to a process, jobs get their answers."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from prometheus_client import CollectorRegistry

from service.errors import (
    DeadlineExceededError,
    InferenceError,
    InvalidImageError,
    ModelStoreError,
    NotReadyError,
    PoisonousImageError,
    ServiceError,
)
from service.metrics import Metrics
from service.settings import Settings
from service.structures import Answer, DetectOptions, Job, Progress
from service.workers.pool import WorkerPool
from service.workers.stored import PRELOAD
from tests.fakes import HANG, KILLER, POISON, load_fakes, picture

# All but torch.
LIGHT_PRELOAD = PRELOAD[:1]


class Bench:
    """A pool of workers with a fake model."""

    def __init__(self, **settings: Any) -> None:
        self.metrics = Metrics(CollectorRegistry())
        self.pool = WorkerPool(
            Settings(**{"device": "cpu", **settings}), load_fakes, self.metrics, preload=LIGHT_PRELOAD
        )

    def submit(self, red: int = 100, *, seconds: float = 120, data: bytes | None = None) -> asyncio.Task[Answer]:
        job = Job(
            model="fake@1",
            data=data or picture(red=red),
            options=DetectOptions(score_thresh=0),
            output="rle",
            deadline=time.monotonic() + seconds,
            progress=Progress("body"),
        )
        return asyncio.create_task(self.pool.run(job))

    def restarts(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("roiserve_worker_restarts_total", {"reason": reason}) or 0.0


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[Bench]:
    bench = Bench(**settings)
    try:
        await bench.pool.start()
        yield bench
    finally:
        await bench.pool.stop()


def score(answer: Answer) -> int:
    """The mean red of the picture that was answered."""
    red: int = round(255 * orjson.loads(answer.encoded)[0]["score"])
    return red


async def test_every_job_gets_its_own_answer_and_its_stages_are_timed() -> None:
    async with running() as bench:
        answers = await asyncio.gather(*(bench.submit(red) for red in range(30, 60)))
        assert [score(answer) for answer in answers] == list(range(30, 60))
        assert max(answer.batch_size for answer in answers) > 1
        stages = ("decode", "queue", "backbone", "encode")
        labels = [{"stage": stage, "model": "fake@1"} for stage in stages]
        value = bench.metrics.registry.get_sample_value
        while not all(value("roiserve_stage_duration_seconds_count", one) for one in labels):
            await asyncio.sleep(0.05)


async def test_errors_of_the_worker_are_raised_here_as_they_were() -> None:
    async with running() as bench:
        with pytest.raises(InvalidImageError):
            await bench.submit(data=picture()[:-30])
        with pytest.raises(InferenceError, match="cannot bear this picture") as raised:
            await bench.submit(POISON)
        assert "in predict" in str(raised.value.__cause__)
        with pytest.raises(DeadlineExceededError):
            await bench.submit(seconds=0)
        assert score(await bench.submit(77)) == 77


async def test_killed_worker_is_replaced_and_all_jobs_are_answered() -> None:
    async with running() as bench:
        jobs = [bench.submit(red) for red in range(30, 70)]
        await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        os.kill(bench.pool.pids[0], signal.SIGKILL)
        assert [score(answer) for answer in await asyncio.gather(*jobs)] == list(range(30, 70))
        assert bench.restarts("killed") == 1


async def test_image_that_kills_its_worker_is_found_and_its_mates_are_answered() -> None:
    async with running() as bench:
        reds = [*range(30, 50), KILLER, *range(50, 70)]
        outcomes = await asyncio.gather(*map(bench.submit, reds), return_exceptions=True)
        assert isinstance(outcomes.pop(20), PoisonousImageError)
        answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
        assert [score(answer) for answer in answers] == list(range(30, 70))
        assert 2 <= bench.restarts("killed") <= 3


async def test_hanging_worker_is_replaced_and_the_image_to_blame_is_found() -> None:
    async with running(probe_timeout_seconds=3) as bench:
        hanging, other = bench.submit(HANG), bench.submit(80)
        assert score(await other) == 80
        with pytest.raises(PoisonousImageError):
            await hanging
        assert bench.restarts("hung") >= 2
        assert score(await bench.submit(81)) == 81


async def test_reply_that_nobody_awaits_any_more_is_dropped() -> None:
    async with running() as bench:
        [handle] = bench.pool._workers
        jobs = [bench.submit(red) for red in range(30, 40)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle.ask({"kind": "ping"}), 0)
        for _ in range(3):
            asking = asyncio.create_task(handle.ask({"kind": "ping"}))
            await asyncio.sleep(0)
            asking.cancel()
        assert [score(answer) for answer in await asyncio.gather(*jobs)] == list(range(30, 40))
        assert bench.restarts("crashed") == bench.restarts("killed") == 0


async def test_abandoned_job_is_forgotten_and_others_go_on() -> None:
    async with running() as bench:
        jobs = [bench.submit(red) for red in range(30, 60)]
        await asyncio.sleep(0)
        for job in jobs[::2]:
            job.cancel()
        kept = await asyncio.gather(*jobs[1::2])
        assert [score(answer) for answer in kept] == list(range(31, 60, 2))
        assert bench.pool._tickets == {}


async def test_several_workers_share_the_work_and_cover_for_each_other() -> None:
    async with running(workers=2) as bench:
        assert len(set(bench.pool.pids)) == 2
        jobs = [bench.submit(red) for red in range(30, 90)]
        await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        assert {ticket.worker for ticket in bench.pool._tickets.values()} == set(bench.pool._workers)
        os.kill(bench.pool.pids[0], signal.SIGKILL)
        assert [score(answer) for answer in await asyncio.gather(*jobs)] == list(range(30, 90))
        assert bench.pool.is_alive


async def test_models_that_cannot_be_loaded_end_the_start() -> None:
    with pytest.raises(ModelStoreError, match=r"broken/1/weights\.safetensors"):
        async with running(models=("broken",)):
            pass


async def test_stop_while_starting_leaves_no_process() -> None:
    bench = Bench()
    starting = asyncio.create_task(bench.pool.start())
    while not bench.pool._workers:
        await asyncio.sleep(0)
    starting.cancel()
    await bench.pool.stop()
    assert bench.pool.pids == []


async def test_model_is_loaded_and_unloaded_in_all_workers_and_in_those_that_come_later() -> None:
    async with running(workers=2) as bench:
        assert (await bench.pool.load("fake@2")).key == "fake@2"
        with pytest.raises(ModelStoreError, match="broken/1"):
            await bench.pool.load("broken")
        await bench.pool.unload("fake@1")
        os.kill(bench.pool.pids[0], signal.SIGKILL)
        while len([handle for handle in bench.pool._workers if handle.is_ready]) < 2 or bench.restarts("killed") < 1:
            await asyncio.sleep(0.01)
        assert [list(handle.models) for handle in bench.pool._workers] == [["fake@2"], ["fake@2"]]


async def test_pool_whose_workers_cannot_be_revived_says_so_and_refuses() -> None:
    async with running() as bench:
        bench.pool._settings = bench.pool._settings.model_copy(update={"models": ("broken",)})
        bench.pool._models = {}
        waiting = bench.submit(KILLER)
        with pytest.raises(ServiceError, match="cannot be revived"):
            await waiting
        assert bench.pool.failure is not None
        assert not bench.pool.is_alive
        assert bench.restarts("start_failed") == 5
        with pytest.raises(NotReadyError, match="cannot be revived"):
            await bench.submit()
