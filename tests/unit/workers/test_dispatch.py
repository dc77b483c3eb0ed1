"""Jobs and workers without processes: what a worker says is scripted, so that it dies at the worst moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest

from service.errors import (
    DeadlineExceededError,
    InvalidImageError,
    OverloadedError,
    PoisonousImageError,
    ServiceError,
)
from service.structures import Answer, DetectOptions, Encoded, Job, Json, Progress
from service.workers.channel import Header, error_to
from service.workers.dispatch import Dispatcher
from service.workers.handle import WorkerHandle
from tests.fakes import FAKE_INFO


class Bench:
    """A dispatcher, and the workers of a test."""

    def __init__(self) -> None:
        self.workers: list[Scripted] = []
        self.dispatcher = Dispatcher(self._ready, max_jobs=72)
        self._submitted = 0

    def _ready(self) -> Sequence[WorkerHandle]:
        return [worker for worker in self.workers if worker.is_ready]

    def submit(self, *, seconds: float = 120, data: bytes | None = None, entries: int = 1) -> asyncio.Task[Answer]:
        """A job; each has other bytes unless the test gives some."""
        self._submitted += 1
        job = Job(
            model="fake@1",
            source=Encoded(data or self._submitted.to_bytes(100, "big")),
            options=DetectOptions(),
            form=Json("rle"),
            deadline=time.monotonic() + seconds,
            progress=Progress("body"),
            entries=entries,
        )
        return asyncio.create_task(self.dispatcher.run(job))


class Scripted(WorkerHandle):
    """A worker without a process: says what a test wants."""

    def __init__(self, bench: Bench, *models: str) -> None:
        super().__init__(bench.dispatcher.receive)
        self.models = dict.fromkeys(models or ("fake@1",), FAKE_INFO)
        self.is_ready = True
        self.jobs: list[int] = []
        self.cancelled: list[int] = []
        self._bench = bench
        bench.workers.append(self)
        bench.dispatcher.dispatch()

    def send(self, header: Header, body: bytes = b"") -> None:
        {"job": self.jobs, "cancel": self.cancelled}[header["kind"]].append(header["id"])

    def say(self, kind: str, job_id: int, **fields: Any) -> None:
        self._bench.dispatcher.receive(self, {"kind": kind, "id": job_id, **fields}, [])

    def begin(self, job_id: int, stage: str = "decode") -> None:
        self.say("mark", job_id, stage=stage, change=1)

    def end(self, job_id: int) -> None:
        self.say("mark", job_id, stage=None, change=-1)

    def fail(self, job_id: int, error: ServiceError | None = None) -> None:
        """An answer as good as any."""
        self.say("error", job_id, error=error_to(error or InvalidImageError("no picture")))

    def die(self, *, of_a_job: bool = True) -> None:
        self.is_ready = False
        self._bench.workers.remove(self)
        self._bench.dispatcher.recover(self, of_a_job=of_a_job)


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
    first, second = Scripted(bench), Scripted(bench)
    jobs = await submitted(bench, 2)
    assert (first.jobs, second.jobs) == ([0], [1])
    first.say("queued", 0, pixels=1_000_000)
    jobs += await submitted(bench, 3)
    assert (first.jobs, second.jobs) == ([0], [1, 2, 3, 4])
    await abandon(*jobs)


async def test_entries_of_an_image_take_places_in_a_worker_and_their_pixels_add_up() -> None:
    bench = Bench()
    worker = Scripted(bench)
    jobs = await submitted(bench, 2, entries=40)
    assert worker.jobs == [0]  # 72 places
    for _ in range(3):
        worker.say("queued", 0, pixels=1000)
    assert bench.dispatcher.waiting_pixels("fake@1") == [3000]
    jobs += await submitted(bench, entries=32)
    assert worker.jobs == [0, 2]
    worker.fail(0)
    assert worker.jobs == [0, 2, 1]
    await asyncio.gather(*jobs[:1], return_exceptions=True)
    await abandon(*jobs[1:])


async def test_image_is_at_risk_until_the_last_of_its_entries_has_left_the_device() -> None:
    """One entry ends, and another waits: neither clears the risk of the third, which ends the worker."""
    bench = Bench()
    worker, other = Scripted(bench), Scripted(bench, "other@1")
    jobs = await submitted(bench, 2)
    worker.begin(0, "inference")
    worker.begin(0, "inference")
    worker.end(0)
    worker.say("queued", 0, pixels=1000)
    assert bench.dispatcher.is_at_risk(worker)
    worker.die()
    fresh = Scripted(bench)
    assert fresh.jobs == [0]  # alone, as a suspect; the innocent one follows
    await abandon(*jobs)
    assert other.jobs == []


async def test_innocent_job_is_not_charged_with_a_death_that_an_abandoned_one_may_have_caused() -> None:
    """One hangs, and its caller goes. Whoever is alone with it when the worker is ended has done nothing."""
    bench = Bench()
    worker = Scripted(bench)
    [hanging] = await submitted(bench)
    worker.begin(0)
    await abandon(hanging)
    [innocent] = await submitted(bench)
    for _ in range(2):
        worker.begin(1)
        worker.die()
        worker = Scripted(bench)
    assert worker.jobs == [1]  # of two deaths it was alone at one
    worker.begin(1)
    worker.die()
    with pytest.raises(PoisonousImageError):
        await innocent


async def test_jobs_are_not_charged_with_the_end_of_a_worker_that_could_not_have_its_models() -> None:
    bench = Bench()
    [job] = await submitted(bench)
    for _ in range(3):
        worker = Scripted(bench)
        worker.begin(0)
        worker.die(of_a_job=False)
    assert not job.done()
    await abandon(job)


async def test_suspects_get_a_worker_of_their_own_under_load_though_another_one_starts_for_long() -> None:
    bench = Bench()
    starting, dying = Scripted(bench), Scripted(bench)
    starting.is_ready = False
    suspects = await submitted(bench, 2)
    dying.begin(0)
    dying.begin(1)
    first, second = Scripted(bench), Scripted(bench)
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
    dying = Scripted(bench)
    suspects = await submitted(bench, 2)
    dying.begin(0)
    dying.begin(1)
    dying.die()
    worker = Scripted(bench)
    assert worker.jobs == [0]
    others = await submitted(bench)
    await abandon(suspects[1])
    await abandon(suspects[0])
    assert worker.jobs == [0, 2]
    await abandon(*others)


async def test_job_that_was_accepted_once_and_is_refused_is_sent_again_if_nothing_else_will_make_it() -> None:
    bench = Bench()
    dying = Scripted(bench)
    [job, other] = await submitted(bench, 2)
    dying.die()
    worker = Scripted(bench)
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


async def test_conviction_goes_for_all_copies_of_an_image_and_for_those_that_come_later() -> None:
    bench = Bench()
    worker = Scripted(bench)
    copies = [bench.submit(data=b"bad") for _ in range(4)]
    await asyncio.sleep(0)
    deaths = 0
    while not all(copy.done() for copy in copies):
        for job in worker.jobs:
            worker.begin(job)
        worker.die()
        deaths += 1
        worker = Scripted(bench)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert deaths == 3
    for copy in [*copies, bench.submit(data=b"bad")]:
        with pytest.raises(PoisonousImageError):
            await copy
    assert worker.jobs == []


async def test_retry_of_an_image_whose_caller_left_before_its_worker_died_is_tried_alone() -> None:
    bench = Bench()
    worker = Scripted(bench)
    [hanging] = await submitted(bench, data=b"bad")
    worker.begin(0)
    await abandon(hanging)
    [innocent] = await submitted(bench)
    assert worker.jobs == [0, 1]  # it need not wait for the other one's end
    worker.die()
    worker = Scripted(bench)
    [again] = await submitted(bench, data=b"bad")
    assert worker.jobs == [1]  # the suspect waits until it can be alone
    worker.fail(1)
    assert worker.jobs == [1, 2]
    await abandon(again)
    with pytest.raises(InvalidImageError):
        await innocent


async def test_suspect_keeps_its_worker_to_itself_after_its_caller_left_until_the_work_has_ended() -> None:
    bench = Bench()
    dying = Scripted(bench)
    [suspect] = await submitted(bench, data=b"suspect")
    dying.begin(0)
    dying.die()
    worker = Scripted(bench)
    worker.begin(0)
    await abandon(suspect)
    others = await submitted(bench)
    assert (worker.jobs, worker.cancelled) == ([0], [0])
    worker.end(0)
    assert worker.jobs == [0, 1]
    again = await submitted(bench, data=b"suspect")
    assert worker.jobs == [0, 1, 2]  # it proved harmless
    await abandon(*others, *again)


async def test_job_whose_error_came_while_a_thread_was_still_at_it_is_still_a_suspect() -> None:
    bench = Bench()
    worker = Scripted(bench)
    [job] = await submitted(bench)
    worker.begin(0)
    worker.fail(0, DeadlineExceededError("too late", stage="decode"))
    with pytest.raises(DeadlineExceededError):
        await job
    assert bench.dispatcher.is_at_risk(worker)
    worker.end(0)
    assert not bench.dispatcher.is_at_risk(worker)
