"""The supervisor with real worker processes and a fake model: whatever happens to a process, jobs get their answers."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing import forkserver
from pathlib import Path
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
    OverloadedError,
    PoisonousImageError,
    ServiceError,
)
from service.metrics import Metrics
from service.settings import Settings
from service.structures import Answer, DetectOptions, Encoded, Job, Json, Progress
from service.workers import pool as pool_module
from service.workers.channel import Header, error_to
from service.workers.detector import PredictorFactory
from service.workers.handle import WorkerHandle
from service.workers.pool import WorkerPool, _Worker
from service.workers.stored import PRELOAD
from tests.fakes import FAKE_INFO, HANG, KILLER, POISON, load_fakes, picture
from tests.faulty_workers import (
    ENDLESS,
    FATAL,
    GATED,
    OnGpus,
    die_in_decode,
    die_in_encode,
    die_when_asked,
    hang_in_decode,
    hang_when_asked,
    load_from_folder,
    load_gated,
    load_unspeakable,
)

# All but torch.
LIGHT_PRELOAD = PRELOAD[:1]


class Bench:
    """A pool of workers with a fake model."""

    def __init__(self, factory: PredictorFactory = load_fakes, **settings: Any) -> None:
        self.metrics = Metrics(CollectorRegistry())
        self.pool = WorkerPool(Settings(**{"device": "cpu", **settings}), factory, self.metrics, preload=LIGHT_PRELOAD)

    @property
    def models(self) -> list[list[str]]:
        """What each worker has loaded that is ready."""
        return [sorted(handle.models) for handle in self.pool._workers if handle.is_ready]

    async def wait_for(self, *models: list[str]) -> None:
        """Until the workers that are ready have these models; the test's own timeout ends it if they never do."""
        while self.models != [*models]:
            await asyncio.sleep(0.01)

    def submit(
        self, red: int = 100, *, seconds: float = 120, data: bytes | None = None, model: str = "fake@1"
    ) -> asyncio.Task[Answer]:
        job = Job(
            model=model,
            source=Encoded(data or picture(red=red)),
            options=DetectOptions(score_thresh=0),
            form=Json("rle"),
            deadline=time.monotonic() + seconds,
            progress=Progress("body"),
        )
        return asyncio.create_task(self.pool.run(job))

    def restarts(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("roiserve_worker_restarts_total", {"reason": reason}) or 0.0


@asynccontextmanager
async def running(factory: PredictorFactory = load_fakes, **settings: Any) -> AsyncIterator[Bench]:
    bench = Bench(factory, **settings)
    try:
        await bench.pool.start()
        yield bench
    finally:
        await bench.pool.stop()


def score(answer: Answer) -> int:
    """The mean red of the picture that was answered."""
    red: int = round(255 * orjson.loads(answer.encoded)[0]["score"])
    return red


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little time between the starts of a worker."""
    monkeypatch.setattr(pool_module, "_FIRST_BACKOFF_SECONDS", 0.001)


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


async def test_worker_is_ended_also_when_the_fork_server_that_bore_it_is_gone() -> None:
    async with running(workers=2) as bench:
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]  # its own
        first, second = bench.pool._workers
        os.kill(first.pid or 0, signal.SIGKILL)
        await first.ended.wait()
        while sum(handle.is_ready for handle in bench.pool._workers) < 2:  # a new one, by a new fork server
            await asyncio.sleep(0.01)
        os.kill(second.pid or 0, signal.SIGSTOP)
        second.kill("hung")
        await second.ended.wait()
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
        while bench.restarts("hung") < 2:
            await asyncio.sleep(0.01)
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
        while bench.restarts("killed") < 1:
            await asyncio.sleep(0.01)
        await bench.wait_for(["fake@2"], ["fake@2"])


async def test_model_loaded_while_a_worker_starts_is_loaded_there_too(tmp_path: Path) -> None:
    async with running(load_gated, workers=2, model_store=tmp_path) as bench:
        loading = asyncio.create_task(bench.pool.load(GATED))
        await asyncio.sleep(0)
        os.kill(bench.pool.pids[1], signal.SIGKILL)
        while bench.restarts("killed") < 1:
            await asyncio.sleep(0.01)
        await bench.wait_for(["fake@1"], ["fake@1"])
        (tmp_path / "go").touch()
        assert (await loading).key == "gated@1"
        await bench.wait_for(["fake@1", "gated@1"], ["fake@1", "gated@1"])


async def test_model_unloaded_while_a_worker_starts_does_not_stay_there(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    async with running(load_gated, workers=2, model_store=tmp_path) as bench:
        await bench.pool.load(GATED)
        (tmp_path / "go").unlink()
        os.kill(bench.pool.pids[1], signal.SIGKILL)
        while not (bench.restarts("killed") and len(bench.pool._workers) == 2):
            await asyncio.sleep(0.01)
        await bench.pool.unload("gated@1")
        (tmp_path / "go").touch()
        await bench.wait_for(["fake@1"], ["fake@1"])


async def test_model_is_unloaded_though_a_worker_dies_meanwhile() -> None:
    async with running(workers=2) as bench:
        await bench.pool.load("fake@2")
        pid = bench.pool.pids[0]
        os.kill(pid, signal.SIGSTOP)
        unloading = asyncio.create_task(bench.pool.unload("fake@1"))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        await unloading
        await bench.wait_for(["fake@2"], ["fake@2"])


async def test_model_that_never_comes_to_be_loaded_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(load_gated) as bench:
        with (
            monkeypatch.context() as patched,
            pytest.raises(NotReadyError, match=r"endless was not loaded within 0\.5 s"),
        ):
            patched.setattr(pool_module, "_START_SECONDS", 0.5)
            await bench.pool.load(ENDLESS)
        assert score(await bench.submit(90)) == 90
        assert bench.models == [["fake@1"]]
        assert bench.restarts("start_failed") == 1


async def test_gpus_are_employed_one_worker_each() -> None:
    async with running(OnGpus(3), device="cuda") as bench:
        devices = [handle.models["fake@1"].device for handle in bench.pool._workers]
        assert sorted(devices) == ["cuda", "cuda:1", "cuda:2"]
        assert bench.pool.capacity == 3 * (64 + 8)


async def test_gpu_that_is_named_is_the_only_one_employed() -> None:
    async with running(OnGpus(3), device="cuda:1") as bench:
        assert [handle.models["fake@1"].device for handle in bench.pool._workers] == ["cuda:1"]


async def test_gpu_whose_worker_cannot_start_is_given_up_and_the_others_serve(hasty: None) -> None:
    async with running(OnGpus(2, dead="cuda:1"), device="cuda") as bench:
        assert [handle.models["fake@1"].device for handle in bench.pool._workers] == ["cuda"]
        assert bench.restarts("start_failed") == 5
        assert bench.pool.failure is None
        assert bench.pool.capacity == 64 + 8
        assert score(await bench.submit(91)) == 91


@pytest.mark.parametrize(
    ("factory", "reason", "limit"), [(die_when_asked, "killed", 60), (hang_when_asked, "hung", 0.2)]
)
async def test_workers_that_end_as_soon_as_they_are_ready_cannot_be_revived(
    factory: PredictorFactory, reason: str, limit: float, hasty: None
) -> None:
    async with running(factory, probe_timeout_seconds=limit) as bench:
        while bench.pool.failure is None:
            await asyncio.sleep(0.01)
        assert bench.restarts(reason) == 5
        with pytest.raises(NotReadyError, match="cannot be revived"):
            await bench.submit()


@pytest.mark.parametrize("factory", [die_in_decode, die_in_encode])
async def test_image_that_kills_a_decoder_or_an_encoder_is_found_and_its_mates_are_answered(
    factory: PredictorFactory,
) -> None:
    async with running(factory) as bench:
        reds = [*range(30, 40), FATAL, *range(40, 50)]
        outcomes = await asyncio.gather(*map(bench.submit, reds), return_exceptions=True)
        assert isinstance(outcomes.pop(10), PoisonousImageError)
        assert [score(answer) for answer in outcomes if isinstance(answer, Answer)] == list(range(30, 50))


async def test_decoder_that_never_comes_to_an_end_is_replaced_and_its_image_found() -> None:
    async with running(hang_in_decode, probe_timeout_seconds=2) as bench:
        with pytest.raises(PoisonousImageError):
            await bench.submit(FATAL)
        while bench.restarts("hung") < 2:
            await asyncio.sleep(0.01)


async def test_error_that_no_frame_can_hold_is_answered_all_the_same() -> None:
    async with running(load_unspeakable) as bench:
        with pytest.raises(ServiceError, match="not JSON serializable"):
            await bench.submit()


async def test_pool_whose_workers_cannot_be_revived_says_so_and_refuses(tmp_path: Path, hasty: None) -> None:
    store = tmp_path / "store"
    store.mkdir()
    async with running(load_from_folder, model_store=store) as bench:
        store.rmdir()
        waiting = bench.submit(KILLER)
        with pytest.raises(ServiceError, match="cannot be revived"):
            await waiting
        assert bench.pool.failure is not None
        assert not bench.pool.is_alive
        assert bench.restarts("start_failed") == 5
        with pytest.raises(NotReadyError, match="cannot be revived"):
            await bench.submit()


class Scripted(WorkerHandle):
    """A worker without a process: says what a test wants."""

    def __init__(self, pool: WorkerPool, *models: str) -> None:
        super().__init__(pool._receive)
        self.models = dict.fromkeys(models or ("fake@1",), FAKE_INFO)
        self.is_ready = True
        self.jobs: list[int] = []
        self._pool = pool
        pool._workers[self] = _Worker(self)

    def send(self, header: Header, body: bytes = b"") -> None:
        if header["kind"] == "job":
            self.jobs.append(header["id"])

    def say(self, kind: str, job_id: int, **fields: Any) -> None:
        self._pool._receive(self, {"kind": kind, "id": job_id, **fields}, b"")

    def begin(self, job_id: int, stage: str = "decode") -> None:
        self.say("mark", job_id, stage=stage, change=1)

    def fail(self, job_id: int, error: ServiceError | None = None) -> None:
        """An answer as good as any."""
        self.say("error", job_id, error=error_to(error or InvalidImageError("no picture")))

    def die(self) -> None:
        self.is_ready = False
        self._pool._recover(self._pool._workers.pop(self))


async def submitted(bench: Bench, count: int = 1, **options: Any) -> list[asyncio.Task[Answer]]:
    """Jobs that the pool has got; their ids count up from 0."""
    jobs = [bench.submit(**options) for _ in range(count)]
    await asyncio.sleep(0)
    return jobs


async def abandon(*jobs: asyncio.Task[Answer]) -> None:
    for job in jobs:
        job.cancel()
    await asyncio.wait(jobs)


async def test_job_goes_to_the_worker_with_the_fewest_pixels_to_do() -> None:
    bench = Bench()
    first, second = Scripted(bench.pool), Scripted(bench.pool)
    jobs = await submitted(bench, 2)
    assert (first.jobs, second.jobs) == ([0], [1])
    first.say("queued", 0, pixels=1_000_000)
    jobs += await submitted(bench, 3)
    assert (first.jobs, second.jobs) == ([0], [1, 2, 3, 4])
    await abandon(*jobs)


async def test_innocent_job_is_not_charged_with_a_death_that_an_abandoned_one_may_have_caused() -> None:
    """One hangs, and its caller goes. Whoever is alone with it when the worker is ended has done nothing."""
    bench = Bench()
    worker = Scripted(bench.pool)
    [hanging] = await submitted(bench)
    worker.begin(0)
    await abandon(hanging)
    [innocent] = await submitted(bench)
    for _ in range(2):
        worker.begin(1)
        worker.die()
        worker = Scripted(bench.pool)
        bench.pool._dispatch()
    assert worker.jobs == [1]  # of two deaths it was alone at one
    worker.begin(1)
    worker.die()
    with pytest.raises(PoisonousImageError):
        await innocent


async def test_jobs_are_not_charged_with_the_end_of_a_worker_that_could_not_have_its_models() -> None:
    bench = Bench()
    [job] = await submitted(bench)
    for _ in range(3):
        worker = Scripted(bench.pool)
        bench.pool._dispatch()
        worker.begin(0)
        worker.kill("start_failed")
        worker.die()
    assert not job.done()
    await abandon(job)


async def test_suspects_get_a_worker_of_their_own_under_load_though_another_one_starts_for_long() -> None:
    bench = Bench()
    starting, dying = Scripted(bench.pool), Scripted(bench.pool)
    starting.is_ready = False
    suspects = await submitted(bench, 2)
    dying.begin(0)
    dying.begin(1)
    first, second = Scripted(bench.pool), Scripted(bench.pool)
    others = await submitted(bench, 4)
    assert (first.jobs, second.jobs) == ([2, 4], [3, 5])
    dying.die()
    others += await submitted(bench, 2)
    assert (first.jobs, second.jobs) == ([2, 4], [3, 5, 6, 7])  # nothing new for the first
    first.fail(2)
    first.fail(4)
    assert first.jobs == [2, 4, 0]
    first.fail(0)
    assert first.jobs == [2, 4, 0, 1]
    first.fail(1)
    await abandon(*suspects, *others)


async def test_worker_that_was_kept_for_a_suspect_takes_others_when_its_caller_goes() -> None:
    bench = Bench()
    dying = Scripted(bench.pool)
    suspects = await submitted(bench, 2)
    dying.begin(0)
    dying.begin(1)
    dying.die()
    worker = Scripted(bench.pool)
    bench.pool._dispatch()
    assert worker.jobs == [0]
    others = await submitted(bench)
    await abandon(suspects[1])
    await abandon(suspects[0])
    assert worker.jobs == [0, 2]
    await abandon(*others)


async def test_job_that_was_accepted_once_and_is_refused_is_sent_again_if_nothing_else_will_make_it() -> None:
    bench = Bench()
    dying = Scripted(bench.pool)
    [job, other] = await submitted(bench, 2)
    dying.die()
    worker = Scripted(bench.pool)
    bench.pool._dispatch()
    assert worker.jobs == [0, 1]
    full = OverloadedError("full", retry_after_seconds=1)
    worker.fail(0, full)
    assert worker.jobs == [0, 1]  # when the other one is done
    await abandon(other)
    assert worker.jobs == [0, 1, 0]
    worker.fail(0, full)
    assert worker.jobs == [0, 1, 0, 0]
    worker.fail(0)
    with pytest.raises(InvalidImageError):
        await job
