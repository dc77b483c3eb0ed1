"""`WorkerPool`: supervised worker processes, one a device. It holds every job until it is answered, sends it to the
worker with the least to do, and sends it again when a worker dies of something.

Who was on the device, or with a decoder or an encoder, when its worker died may have been the cause. Such a job is
tried again alone in a worker; if it is alone at a second death, it is to blame, and fails. All others are none the
wiser. A worker that dies while no job can have been the cause, before it was of any use, counts as one that failed to
start; so many in a row end the hope for its device.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.errors import (
    DeadlineExceededError,
    NotReadyError,
    OverloadedError,
    PoisonousImageError,
    ServiceError,
)
from service.logs import request_id_context
from service.metrics import Metrics
from service.settings import Settings
from service.structures import Answer, Job, ModelInfo
from service.workers.channel import Header, error_from, form_to, model_info_from, options_to, source_to
from service.workers.detector import PredictorFactory
from service.workers.handle import WorkerHandle

logger = logging.getLogger(__name__)

# So many starts that fail in a row are enough to despair of a device.
_MAX_FAILED_STARTS = 5
# A worker that has been ready for so long and is well, or has answered a job, did not fail to start.
_TRIAL_SECONDS = 10.0
_FIRST_BACKOFF_SECONDS = 0.5
# Deaths at which a job was alone in its worker, after which it is the one to blame.
_MAX_DEATHS_ALONE = 2
_PING_SECONDS = 1.0
# What a model may take to load, be compiled and warm up, all of them together.
_START_SECONDS = 900.0


@dataclass(slots=True, eq=False)
class _Ticket:
    """A job that is not answered yet.

    Attributes:
        worker: where it is; None while it waits for one.
        marks: threads of the worker that are at it, so that it may be the cause if the worker dies.
        padded_pixels: while it waits for the device.
        deaths_alone: how many workers died while they had nothing else to do.
    """

    id: int
    job: Job
    outcome: asyncio.Future[Answer | ServiceError]
    request_id: str | None
    worker: WorkerHandle | None = None
    marks: int = 0
    is_resent: bool = False
    padded_pixels: int | None = None
    deaths_alone: int = 0

    @property
    def cost(self) -> int:
        """In pixels, if need be a guess."""
        return self.padded_pixels or self.job.likely_pixels

    def answer(self, outcome: Answer | ServiceError) -> None:
        """The end of it, if its caller still waits."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)


@dataclass(slots=True, eq=False)
class _Worker:
    """A worker process and what it has to do.

    Attributes:
        tickets: by id, in the order in which they were sent.
        is_reserved: whether it gets no job but a suspect, which must be alone, until it has nothing to do any more.
        is_haunted: whether it may still be at a job that nobody waits for any more, so that no other is alone in it.
        is_proven: whether it was of use.
    """

    handle: WorkerHandle
    tickets: dict[int, _Ticket] = field(default_factory=dict)
    is_reserved: bool = False
    is_haunted: bool = False
    is_proven: bool = False

    @property
    def cost(self) -> int:
        """Of all it has to do."""
        return sum(ticket.cost for ticket in self.tickets.values())

    def count(self, *, is_bulk: bool) -> int:
        """Jobs of a priority that it has: each has places of its own."""
        return sum(ticket.job.is_bulk is is_bulk for ticket in self.tickets.values())

    @property
    def may_die_of_a_job(self) -> bool:
        """Whether a job would be suspected if it died now."""
        if self.handle.was_killed_for == "start_failed":
            return False  # it was ended for what models it has, not for what it did
        return self.is_haunted or any(ticket.marks > 0 for ticket in self.tickets.values())

    def remove(self, ticket: _Ticket) -> None:
        """It has nothing more to do with this job."""
        del self.tickets[ticket.id]
        self.is_reserved &= bool(self.tickets)


class WorkerPool:
    """See the module.

    Args:
        factory: loads the models, in each worker.
        preload: modules that the fork server imports, so that no worker has to.
    """

    def __init__(
        self, settings: Settings, factory: PredictorFactory, metrics: Metrics, *, preload: Sequence[str]
    ) -> None:
        # Workers need no keys.
        self._settings = settings.without_keys()
        self._factory = factory
        self._metrics = metrics
        self._preload = list(preload)
        self._max_jobs = settings.max_queue_size + settings.max_batch_size
        self._ids = itertools.count()
        self._models: dict[str, ModelInfo] = {}
        self._workers: dict[WorkerHandle, _Worker] = {}
        self._supervisors: list[asyncio.Task[None]] = []
        self._commands: set[asyncio.Task[Any]] = set()
        self._tickets: dict[int, _Ticket] = {}
        self._pending: deque[_Ticket] = deque()
        self._suspects: deque[_Ticket] = deque()
        self._changing = asyncio.Lock()
        self._started: asyncio.Future[Sequence[ModelInfo]] | None = None
        self._hopeless = 0
        self.failure: str | None = None

    async def start(self) -> Sequence[ModelInfo]:
        """Start the workers and wait until all are ready. The first says how many devices there are."""
        multiprocessing.get_context("forkserver").set_forkserver_preload(self._preload)
        self._started = asyncio.get_running_loop().create_future()
        self._employ(self._settings.device)
        return await self._started

    async def stop(self) -> None:
        """End the workers, whatever they are at."""
        for task in (*self._supervisors, *self._commands):
            task.cancel()
        await asyncio.gather(*self._supervisors, *self._commands, return_exceptions=True)
        self._fail_all(NotReadyError("the service stopped before this request was done"))

    async def run(self, job: Job) -> Answer:
        """Have a job done by a worker, or by several if they die meanwhile."""
        if self.failure is not None:
            raise NotReadyError(self.failure)
        job.progress.enter("decode")
        outcome: asyncio.Future[Answer | ServiceError] = asyncio.get_running_loop().create_future()
        ticket = _Ticket(next(self._ids), job, outcome, request_id_context.get())
        self._tickets[ticket.id] = ticket
        self._pending.append(ticket)
        self._dispatch()
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                answer = await outcome
        except TimeoutError:
            stage = job.progress.stage
            raise DeadlineExceededError(f"the deadline passed in the stage {stage!r}", stage=stage) from None
        finally:
            self._forget(ticket)
        if isinstance(answer, ServiceError):
            raise answer
        return answer

    async def load(self, reference: str) -> ModelInfo:
        """Load a further model, in one worker first, then in the others; if one cannot, in none."""
        async with self._changing:
            workers = [handle for handle in self._workers if handle.is_ready]
            if not workers:
                raise NotReadyError("no worker is alive to load a model")
            try:
                info = await self._load_into(workers[0], reference)
                for handle in workers[1:]:
                    if handle.is_ready:
                        await self._load_into(handle, info.key)
                self._models[info.key] = info
            finally:
                await self._level_all()
            return info

    async def unload(self, model_key: str) -> None:
        """Forget a model, in all workers."""
        async with self._changing:
            self._models.pop(model_key, None)
            await self._level_all()

    def waiting_pixels(self, model_key: str) -> Sequence[int]:
        """Of each image that waits for a device on behalf of one model, its pixels, resized and padded."""
        return [
            one.padded_pixels
            for one in self._tickets.values()
            if one.padded_pixels is not None and one.job.progress.stage == "queue" and one.job.model == model_key
        ]

    def memory(self) -> Mapping[tuple[str, str], float]:
        """Bytes by device and kind, of all workers together; a few seconds old."""
        sizes: Counter[tuple[str, str]] = Counter()
        for handle in self._workers:
            for labels, size in handle.memory.items():
                # Two workers on one GPU see the same total.
                sizes[labels] = int(max(sizes[labels], size) if labels[1] == "total" else sizes[labels] + size)
        return sizes

    @property
    def capacity(self) -> int:
        """Jobs that may be under way, in all workers together."""
        return self._max_jobs * max(1, len(self._supervisors) - self._hopeless)

    @property
    def is_alive(self) -> bool:
        """Whether any worker takes jobs."""
        return any(handle.is_ready for handle in self._workers)

    @property
    def pids(self) -> Sequence[int]:
        """Of the workers that run."""
        return [handle.pid for handle in self._workers if handle.pid is not None]

    # Supervision

    @property
    def _is_called_off(self) -> bool:
        """Whether the first start has failed, so that there will be nothing to serve."""
        return self._started is not None and self._started.done() and self._started.exception() is not None

    def _employ(self, device: str) -> None:
        self._supervisors.append(asyncio.create_task(self._supervise(device)))

    async def _supervise(self, device: str) -> None:
        """Keep one worker running on a device, by way of as many processes as it takes."""
        failed_starts = 0
        while failed_starts < _MAX_FAILED_STARTS:
            await asyncio.sleep(_FIRST_BACKOFF_SECONDS * (2**failed_starts - 1))
            failed_starts = 0 if await self._see_through(device) else failed_starts + 1
            if self._is_called_off:
                return
        self._despair_of(device)

    def _despair_of(self, device: str) -> None:
        """Go on with the other devices, if there are any."""
        self._hopeless += 1
        reason = f"{_MAX_FAILED_STARTS} starts in a row failed"
        logger.error("giving up a device", extra={"fields": {"device": device, "reason": reason}})
        if self._hopeless < len(self._supervisors):
            self._see_whether_all_started()
            return
        self.failure = f"the workers cannot be revived: {reason}"
        error = NotReadyError(self.failure)
        if self._started is not None and not self._started.done():
            self._started.set_exception(error)
        self._fail_all(error)

    async def _see_through(self, device: str) -> bool:
        """Start a worker and serve it to its end; whether it was of use, or may have died of a job."""
        handle = WorkerHandle(self._receive)
        worker = self._workers[handle] = _Worker(handle)
        update = {"device": device, **({"models": tuple(self._models)} if self._models else {})}
        watching: asyncio.Task[None] | None = None
        try:
            await handle.start(self._settings.model_copy(update=update), self._factory)
            watching = asyncio.create_task(self._watch(worker))
            await handle.ended.wait()
        except Exception as error:
            logger.error("worker cannot be started", exc_info=error)
        finally:
            if watching is not None:
                watching.cancel()
            was_good = worker.is_proven or worker.may_die_of_a_job
            del self._workers[handle]
            self._recover(worker)
            status = await handle.finish()
        if self._is_called_off:
            return False
        reason = handle.was_killed_for or ("crashed" if status is None or status >= 0 else "killed")
        reason = reason if handle.got_ready.is_set() else "start_failed"
        self._metrics.worker_restarts.labels(reason).inc()
        fields = {"device": device, "reason": reason, "exit_status": status}
        logger.error("worker ended", extra={"fields": fields})
        return was_good

    async def _watch(self, worker: _Worker) -> None:
        """Ask a worker now and then how it is, and end it if it does not answer or makes no progress."""
        handle, limit = worker.handle, self._settings.probe_timeout_seconds
        try:
            async with asyncio.timeout(_START_SECONDS):
                await handle.got_ready.wait()
        except TimeoutError:
            handle.kill("start_failed")
            return
        ready_at = time.monotonic()
        while not handle.ended.is_set():
            try:
                async with asyncio.timeout(limit):
                    pong = await handle.ask({"kind": "ping"})
            except (TimeoutError, ServiceError):
                handle.kill("hung")
                return
            handle.memory = {(device, kind): size for device, kind, size in pong["memory"]}
            self._observe(pong)
            if pong["busy_seconds"] > limit:
                handle.kill("hung")
                return
            worker.is_haunted &= pong["busy_seconds"] > 0
            worker.is_proven |= time.monotonic() - ready_at > _TRIAL_SECONDS
            await asyncio.sleep(min(_PING_SECONDS, limit / 4))

    # What workers say

    def _receive(self, handle: WorkerHandle, header: Header, body: bytes) -> None:
        worker = self._workers.get(handle)
        if worker is None:
            return
        kind = header["kind"]
        if kind == "hello":
            self._employ_others(header["gpus"])
        elif kind == "ready":
            self._welcome(worker, [model_info_from(fields) for fields in header["models"]])
        elif kind == "failed":
            self._dismiss(worker, error_from(header["error"]))
        elif (ticket := worker.tickets.get(header["id"])) is None:
            return  # its caller has gone
        elif kind == "mark":
            ticket.marks += header["change"]
            if header["change"] >= 0 and header["stage"] not in (None, ticket.job.progress.stage):
                ticket.job.progress.enter(header["stage"])
        elif kind == "queued":
            ticket.padded_pixels = header["pixels"]
            ticket.job.progress.enter("queue")
        else:
            self._settle(worker, ticket, header, body)

    def _employ_others(self, gpus: int) -> None:
        """The first worker has said how many GPUs it sees; one that the settings name is for all workers."""
        if len(self._supervisors) == 1:
            is_shared = ":" in self._settings.device or gpus == 0
            for index in range(1, self._settings.workers or (1 if is_shared else gpus)):
                self._employ(self._settings.device if is_shared else f"cuda:{index % gpus}")

    def _welcome(self, worker: _Worker, infos: Sequence[ModelInfo]) -> None:
        """A worker is ready. Models may have come and gone while it started."""
        worker.handle.models = {info.key: info for info in infos}
        worker.handle.is_ready = True
        worker.handle.got_ready.set()
        assert self._started is not None
        if not self._started.done():
            self._models = self._models or dict(worker.handle.models)
            self._see_whether_all_started()
        self._in_background(self._level_later(worker.handle))
        self._dispatch()

    def _see_whether_all_started(self) -> None:
        ready = sum(handle.is_ready for handle in self._workers)
        if self._started is not None and not self._started.done() and ready == len(self._supervisors) - self._hopeless:
            self._started.set_result(list(self._models.values()))

    def _dismiss(self, worker: _Worker, error: ServiceError) -> None:
        """A worker cannot load its models. At the first start that is the end; later, another try may do better."""
        assert self._started is not None
        if self._started.done():
            logger.error("worker cannot load its models", extra={"fields": {"reason": str(error)}})
        else:
            self._started.set_exception(error)
        worker.handle.kill("start_failed")

    def _settle(self, worker: _Worker, ticket: _Ticket, header: Header, body: bytes) -> None:
        if header["kind"] == "answer":
            self._observe(header)
            ticket.job.progress.enter("respond")
            ticket.job.progress.stage_seconds |= header["stage_seconds"]
            fields = header["answer"] | {"image_size": tuple(header["answer"]["image_size"])}
            outcome: Answer | ServiceError = Answer(**fields, encoded=body)
        else:
            outcome = error_from(header["error"])
        worker.is_proven = True
        worker.remove(ticket)
        if isinstance(outcome, OverloadedError) and ticket.is_resent:
            # It was accepted once: it waits for its turn, which comes when the worker has done something else.
            ticket.worker = None
            self._pending.appendleft(ticket)
            if worker.tickets:
                return
        else:
            ticket.answer(outcome)
        self._dispatch()

    def _observe(self, header: Header) -> None:
        for name, labels, value in header["observations"]:
            self._metrics.observe(name, labels, value)

    # Jobs

    def _dispatch(self) -> None:
        """Send what can be sent: suspects to workers with nothing else to do, the others to the least busy."""
        ready = [worker for worker in self._workers.values() if worker.handle.is_ready]
        for worker in ready:
            if not worker.tickets and (suspect := self._suspect_for(worker)) is not None:
                self._suspects.remove(suspect)
                self._send(worker, suspect)
                worker.is_reserved = True
        if not any(worker.is_reserved for worker in ready):
            # For suspects that still wait, one worker shall come to have nothing else to do: the soonest done.
            able = [worker for worker in ready if self._suspect_for(worker) is not None]
            for worker in sorted(able, key=lambda worker: worker.cost)[:1]:
                worker.is_reserved = True
        waiting, self._pending = self._pending, deque()
        for ticket in waiting:
            if (chosen := self._choose(ticket, ready)) is None:
                self._pending.append(ticket)
            else:
                self._send(chosen, ticket)

    def _suspect_for(self, worker: _Worker) -> _Ticket | None:
        return next((one for one in self._suspects if one.job.model in worker.handle.models), None)

    def _choose(self, ticket: _Ticket, ready: Sequence[_Worker]) -> _Worker | None:
        able = [
            worker
            for worker in ready
            if ticket.job.model in worker.handle.models
            if not worker.is_reserved and worker.count(is_bulk=ticket.job.is_bulk) < self._max_jobs
        ]
        return min(able, key=lambda worker: worker.cost, default=None)

    def _send(self, worker: _Worker, ticket: _Ticket) -> None:
        ticket.worker = worker.handle
        worker.tickets[ticket.id] = ticket
        job = ticket.job
        source, body = source_to(job.source)
        header = {
            "kind": "job",
            "id": ticket.id,
            "request_id": ticket.request_id,
            "model": job.model,
            "options": options_to(job.options),
            "source": source,
            "form": form_to(job.form),
            "deadline": job.deadline,
            "is_bulk": job.is_bulk,
        }
        worker.handle.send(header, body)

    def _forget(self, ticket: _Ticket) -> None:
        """A job is answered, or nobody waits for it any more."""
        del self._tickets[ticket.id]
        for line in (self._pending, self._suspects):
            if ticket in line:
                line.remove(ticket)
        worker = None if ticket.worker is None else self._workers.get(ticket.worker)
        if worker is not None and ticket.id in worker.tickets:
            worker.handle.send({"kind": "cancel", "id": ticket.id})
            worker.remove(ticket)
            worker.is_haunted |= ticket.marks > 0
            self._dispatch()

    def _recover(self, worker: _Worker) -> None:
        """A worker has died: send its jobs to others, the suspects one at a time."""
        lost = list(worker.tickets.values())
        is_alone = len(lost) == 1 and not worker.is_haunted
        may_be_to_blame = worker.may_die_of_a_job
        for ticket in reversed(lost):
            ticket.worker, ticket.padded_pixels, ticket.is_resent = None, None, True
            was_at_risk, ticket.marks = ticket.marks > 0 and may_be_to_blame, 0
            ticket.deaths_alone += was_at_risk and is_alone
            ticket.job.progress.enter("decode")
            if ticket.deaths_alone == _MAX_DEATHS_ALONE:
                ticket.answer(PoisonousImageError("this image stopped the worker twice, both times alone"))
            elif ticket.deaths_alone > 0:
                self._suspects.append(ticket)  # the others first: it may have been an accident
            elif was_at_risk:
                self._suspects.appendleft(ticket)
            else:
                self._pending.appendleft(ticket)
        self._dispatch()

    def _fail_all(self, error: ServiceError) -> None:
        for ticket in self._tickets.values():
            ticket.answer(error)

    # Models

    async def _load_into(self, handle: WorkerHandle, reference: str) -> ModelInfo:
        try:
            async with asyncio.timeout(_START_SECONDS):
                reply = await handle.ask({"kind": "load", "model": reference})
        except TimeoutError:
            # It would go on for ever, and keep what it has loaded so far.
            handle.kill("start_failed")
            raise NotReadyError(f"the model {reference} was not loaded within {_START_SECONDS:g} s") from None
        info = model_info_from(reply["model"])
        handle.models[info.key] = info
        self._dispatch()
        return info

    async def _level_all(self) -> None:
        for handle in list(self._workers):
            await self._level(handle)

    async def _level_later(self, handle: WorkerHandle) -> None:
        async with self._changing:
            await self._level(handle)

    async def _level(self, handle: WorkerHandle) -> None:
        """Give a worker, if it is ready, the models that are served, and take the others from it. One that cannot have
        them is replaced. Whoever calls this holds `_changing`.
        """
        if not handle.is_ready:
            return
        try:
            for key in self._models.keys() - handle.models.keys():
                await self._load_into(handle, key)
            for key in handle.models.keys() - self._models.keys():
                del handle.models[key]
                await handle.ask({"kind": "unload", "model": key})
        except ServiceError as error:
            logger.error("worker cannot have the models that are served", extra={"fields": {"reason": str(error)}})
            handle.kill("start_failed")

    def _in_background(self, command: Any) -> None:
        task = asyncio.create_task(command)
        self._commands.add(task)
        task.add_done_callback(self._commands.discard)
