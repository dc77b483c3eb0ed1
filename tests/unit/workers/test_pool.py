"""The supervisor with real worker processes and a fake model: whatever happens to a process, jobs get their answers."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client import CollectorRegistry

from service import cores
from service.errors import (
    DeadlineExceededError,
    InferenceError,
    InvalidImageError,
    ModelStoreError,
    NotReadyError,
    PoisonousImageError,
    ServiceError,
)
from service.logs import request_id_context
from service.metrics import Metrics
from service.settings import Settings
from service.structures import Answer, DetectOptions, Encoded, Job, Json, Progress
from service.workers import fork_server, pool, served_models, supervision
from service.workers.detector import PredictorFactory
from service.workers.pool import WorkerPool
from service.workers.stored import PRELOAD
from tests.fakes import HANG, KILLER, POISON, load_fakes, load_telling, picture
from tests.faulty_workers import (
    DEADLY_TAIL,
    ENDLESS,
    FATAL,
    GATED,
    OnGpus,
    die_in_decode,
    die_in_encode,
    die_in_header,
    die_when_asked,
    die_while_starting,
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
        return [sorted(handle.models) for handle in self.pool._ready_workers()]

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
    monkeypatch.setattr(supervision, "_FIRST_BACKOFF_SECONDS", 0.001)


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
        os.kill(fork_server._pid() or 0, signal.SIGKILL)
        first, second = bench.pool._workers()
        os.kill(first.pid or 0, signal.SIGKILL)
        await first.ended.wait()
        while sum(handle.is_ready for handle in bench.pool._workers()) < 2:  # a new one, by a new fork server
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
        [handle] = bench.pool._workers()
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
        assert bench.pool._dispatcher._tickets == {}


async def test_several_workers_share_the_work_and_cover_for_each_other() -> None:
    async with running(workers=2) as bench:
        assert len(set(bench.pool.pids)) == 2
        jobs = [bench.submit(red) for red in range(30, 90)]
        await asyncio.sleep(0)  # all are sent now, and none is answered
        assert {ticket.worker for ticket in bench.pool._dispatcher._tickets.values()} == set(bench.pool._workers())
        await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        os.kill(bench.pool.pids[0], signal.SIGKILL)
        assert [score(answer) for answer in await asyncio.gather(*jobs)] == list(range(30, 90))
        assert bench.pool.is_alive


CORES = sorted(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="there is one core")


def bound_to(bench: Bench) -> list[list[int]]:
    """The cores of each worker."""
    return sorted(sorted(os.sched_getaffinity(pid)) for pid in bench.pool.pids)


def told(bench: Bench) -> set[str]:
    return {handle.models["fake@1"].engine for handle in bench.pool._workers()}


@needs_two_cores
async def test_workers_are_bound_to_cores_of_their_own_and_so_is_a_replacement() -> None:
    half = len(CORES) // 2
    async with running(load_telling, workers=2, bind_workers="cores") as bench:
        first, second = bound_to(bench)
        assert not set(first) & set(second)
        assert sorted(first + second) == CORES
        assert f"1 sharing, {min(8, half)} decoding" in told(bench)
        os.kill(bench.pool.pids[0], signal.SIGKILL)
        while not (bench.restarts("killed") and len(bench.pool._ready_workers()) == 2):
            await asyncio.sleep(0.01)
        assert bound_to(bench) == [first, second]


@needs_two_cores
async def test_a_worker_for_each_numa_node_is_the_default_and_keeps_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_nodes(**_: object) -> list[tuple[int, ...]]:
        return [tuple(CORES[:1]), tuple(CORES[1:])]

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for module in (cores, pool):
        monkeypatch.setattr(module, "numa_nodes", two_nodes)
    async with running(load_telling) as bench:
        assert bound_to(bench) == [CORES[:1], CORES[1:]]
        assert "1 sharing, 1 decoding" in told(bench)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    async with running(load_telling) as bench:
        assert bound_to(bench) == [CORES]


async def test_workers_that_are_not_bound_share_all_cores() -> None:
    async with running(load_telling, workers=2, bind_workers="off", decode_threads=5) as bench:
        assert bound_to(bench) == [CORES, CORES]
        assert told(bench) == {"2 sharing, 5 decoding"}


async def test_models_that_cannot_be_loaded_end_the_start() -> None:
    with pytest.raises(ModelStoreError, match=r"broken/1/weights\.safetensors"):
        async with running(models=("broken",)):
            pass


async def test_stop_while_starting_leaves_no_process() -> None:
    bench = Bench()
    starting = asyncio.create_task(bench.pool.start())
    while not bench.pool._workers():
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
        while not (bench.restarts("killed") and len(bench.pool._workers()) == 2):
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
            patched.setattr(served_models, "START_SECONDS", 0.5)
            await bench.pool.load(ENDLESS)
        assert score(await bench.submit(90)) == 90
        assert bench.models == [["fake@1"]]
        assert bench.restarts("start_failed") == 1


async def test_gpus_are_employed_one_worker_each() -> None:
    async with running(OnGpus(3), device="cuda") as bench:
        devices = [handle.models["fake@1"].device for handle in bench.pool._workers()]
        assert sorted(devices) == ["cuda:0", "cuda:1", "cuda:2"]
        assert bench.pool.capacity == 3 * (64 + 8)


async def test_gpu_that_is_named_is_the_only_one_employed() -> None:
    async with running(OnGpus(3), device="cuda:1") as bench:
        assert [handle.models["fake@1"].device for handle in bench.pool._workers()] == ["cuda:1"]


async def test_gpu_whose_worker_cannot_start_is_given_up_and_the_others_serve(hasty: None) -> None:
    async with running(OnGpus(2, dead="cuda:1"), device="cuda") as bench:
        assert [handle.models["fake@1"].device for handle in bench.pool._ready_workers()] == ["cuda:0"]
        while bench.restarts("start_failed") < 5:
            assert score(await bench.submit(91)) == 91
        assert bench.pool.failure is None
        assert bench.pool.capacity == 64 + 8


async def test_gpu_that_says_why_it_cannot_start_does_not_stop_the_others(hasty: None) -> None:
    async with running(OnGpus(2, refusing="cuda:1"), device="cuda") as bench:
        assert [handle.models["fake@1"].device for handle in bench.pool._ready_workers()] == ["cuda:0"]
        assert score(await bench.submit(91)) == 91
        assert bench.pool.capacity == 64 + 8
        while bench.restarts("start_failed") < 3:  # it is tried again
            await asyncio.sleep(0.01)
        assert bench.pool.failure is None


async def test_start_ends_with_the_reason_when_no_gpu_can(hasty: None) -> None:
    bench = Bench(OnGpus(2, refusing="cuda"), device="cuda")
    with pytest.raises(ModelStoreError, match="no kernel image for cuda:0"):
        await bench.pool.start()
    assert bench.pool.pids == []


@pytest.mark.parametrize(
    ("factory", "reason", "limit"), [(die_when_asked, "killed", 60), (hang_when_asked, "hung", 0.2)]
)
async def test_device_whose_workers_end_as_soon_as_they_are_ready_is_down_and_tried_again(
    factory: PredictorFactory, reason: str, limit: float, hasty: None
) -> None:
    async with running(factory, probe_timeout_seconds=limit) as bench:
        while bench.pool.failure is None:
            await asyncio.sleep(0.01)
        with pytest.raises(NotReadyError, match="starts in a row failed"):
            await bench.submit()
        while bench.restarts(reason) < 7:
            await asyncio.sleep(0.01)


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


def failure_of(bench: Bench) -> str | None:
    return bench.pool.failure


async def test_device_that_is_down_is_tried_again_until_a_worker_starts(tmp_path: Path, hasty: None) -> None:
    store = tmp_path / "store"
    store.mkdir()
    async with running(load_from_folder, model_store=store) as bench:
        store.rmdir()
        waiting = bench.submit(KILLER)
        with pytest.raises(NotReadyError, match=r"starts in a row failed.*there is no model store") as raised:
            await waiting
        assert raised.value.retry_after_seconds >= 1
        assert failure_of(bench) is not None
        with pytest.raises(NotReadyError, match="another try will follow"):
            await bench.submit()
        store.mkdir()
        while not bench.pool.is_alive:
            await asyncio.sleep(0.01)
        assert failure_of(bench) is None
        assert score(await bench.submit(92)) == 92


async def test_workers_that_die_while_starting_are_followed_by_one_that_does_not(tmp_path: Path, hasty: None) -> None:
    async with running(die_while_starting, model_store=tmp_path) as bench:
        (tmp_path / "die").touch()
        os.kill(bench.pool.pids[0], signal.SIGKILL)
        while bench.pool.failure is None:
            await asyncio.sleep(0.01)
        (tmp_path / "die").unlink()
        while not bench.pool.is_alive:
            await asyncio.sleep(0.01)
        assert score(await bench.submit(93)) == 93
        assert bench.restarts("start_failed") >= 4  # and the one that was killed, of no use so far


async def test_worker_that_stands_still_is_replaced_long_before_a_slow_batch_would_count_as_hung(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervision, "_MAX_SILENT_SECONDS", 2.0)
    async with running(probe_timeout_seconds=3600) as bench:
        os.kill(bench.pool.pids[0], signal.SIGSTOP)
        assert score(await bench.submit(94)) == 94
        while bench.restarts("hung") < 1:
            await asyncio.sleep(0.01)


async def test_image_that_dies_in_its_header_is_found_and_its_mates_are_answered() -> None:
    async with running(die_in_header) as bench:
        jobs = [bench.submit(red) for red in range(30, 40)]
        jobs.insert(5, bench.submit(data=picture(red=60) + DEADLY_TAIL))
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
        assert isinstance(outcomes.pop(5), PoisonousImageError)
        assert [score(answer) for answer in outcomes if isinstance(answer, Answer)] == list(range(30, 40))
        assert bench.restarts("start_failed") == 0


async def test_image_that_hangs_its_worker_for_longer_than_its_callers_wait_is_convicted() -> None:
    async with running(hang_in_decode, probe_timeout_seconds=2) as bench:
        for deaths in (1, 2):
            await bench.wait_for(["fake@1"])
            waiting = bench.submit(FATAL)
            while not any(map(bench.pool._dispatcher.is_at_risk, bench.pool._workers())):
                await asyncio.sleep(0.01)
            waiting.cancel()
            while bench.restarts("hung") < deaths:
                await asyncio.sleep(0.01)
        with pytest.raises(PoisonousImageError, match="refused for 60 minutes"):
            await bench.submit(FATAL)
        assert score(await bench.submit(95)) == 95
        assert bench.restarts("hung") == 2


async def test_end_of_a_worker_is_logged_with_the_requests_at_risk(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as bench:
        token = request_id_context.set("the-guilty-one")
        with pytest.raises(PoisonousImageError):
            await bench.submit(KILLER)
        request_id_context.reset(token)
        ends = [record for record in caplog.records if record.message == "worker ended"]
        while len(ends) < 2:
            await asyncio.sleep(0.01)
            ends = [record for record in caplog.records if record.message == "worker ended"]
        assert [record.__dict__["fields"]["requests_at_risk"] for record in ends] == ["the-guilty-one"] * 2
