"""`Dispatcher`: holds every job until it is answered, sends it to a worker, and resends it if that worker dies, unless
the job is to blame. `blame.py` decides which job is to blame for a death, `routing.py` which worker gets which job.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.errors import (
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    OverloadedError,
    PoisonousImageError,
    ServiceError,
)
from service.logs import request_id_context
from service.structures import Answer, Job
from service.workers.blame import MAX_DEATHS_ALONE, Blame, Verdict
from service.workers.channel import Header, error_from, form_to, options_to, source_to
from service.workers.handle import WorkerHandle
from service.workers.routing import Router
from service.workers.suspects import REMEMBERED_SECONDS, KnownSuspects

# Limit for the requests named in one log line.
_MOST_NAMED_REQUESTS = 20

Outcome = Answer | ServiceError


@dataclass(slots=True, eq=False)
class Ticket:
    """A job that is not answered yet.

    Attributes:
        worker: the worker that has it; None while it waits for one.
        padded_pixels: resized and padded pixels of all its entries so far; None until one waits for the device.
        is_resent: whether a worker died with it.
    """

    id: int
    job: Job
    outcome: asyncio.Future[Outcome]
    request_id: str | None
    worker: WorkerHandle | None = None
    padded_pixels: int | None = None
    is_resent: bool = False

    @property
    def model(self) -> str:
        """The key of the model that it needs."""
        return self.job.model

    @property
    def is_bulk(self) -> bool:
        """Its priority."""
        return self.job.is_bulk

    @property
    def entries(self) -> int:
        """How many places it needs."""
        return self.job.entries

    @property
    def cost(self) -> int:
        """In pixels; a guess until the padded size is known."""
        return self.padded_pixels or self.job.likely_pixels

    def answer(self, outcome: Outcome) -> None:
        """End it, if its caller still waits."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class Dispatcher:
    """See the module.

    Args:
        ready_workers: returns the workers that take jobs now.
        max_jobs: most jobs of each priority in one worker.
    """

    def __init__(self, ready_workers: Callable[[], Sequence[WorkerHandle]], *, max_jobs: int) -> None:
        self._ready_workers = ready_workers
        self._ids = itertools.count()
        self._blame = Blame()
        self._router: Router[WorkerHandle, Ticket] = Router(self._blame, max_jobs=max_jobs)
        self._known = KnownSuspects()
        self._tickets: dict[int, Ticket] = {}
        # Their callers have stopped waiting, but their workers are still working on them.
        self._abandoned: dict[int, Ticket] = {}

    async def run(self, job: Job) -> Answer:
        """Have a worker do a job, or several in turn if they die.

        Raises:
            PoisonousImageError: the job was convicted, now or earlier.
            DeadlineExceededError: no worker answered in time.
            ServiceError: the error that a worker answered.
        """
        deaths_alone = self._known.deaths_alone(job)
        if deaths_alone is not None and deaths_alone >= MAX_DEATHS_ALONE:
            raise _conviction()
        job.progress.enter("decode")
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        ticket = Ticket(next(self._ids), job, outcome, request_id_context.get())
        self._tickets[ticket.id] = ticket
        if deaths_alone is not None:
            self._blame.suspect(ticket.id, deaths_alone=deaths_alone)
        self._router.add(ticket)
        self.dispatch()
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                answer = await outcome
        except TimeoutError:
            stage = job.progress.stage
            raise DeadlineExceededError(f"the deadline passed in the stage {stage!r}", stage=stage) from None
        finally:
            self._close(ticket)
        if isinstance(answer, ServiceError):
            raise answer
        return answer

    def dispatch(self) -> None:
        """Send the jobs that can be sent; call it whenever that may have changed."""
        for worker, ticket in self._router.assign(self._ready_workers(), self._load_of):
            ticket.worker = worker
            job = ticket.job
            source, body = source_to(job.source)
            header = {
                "kind": "job",
                "id": ticket.id,
                "request_id": ticket.request_id,
                "trace_id": job.progress.trace_id,
                "model": job.model,
                "options": options_to(job.options),
                "source": source,
                "form": form_to(job.form),
                "deadline": job.deadline,
                "is_bulk": job.is_bulk,
                "entries": job.entries,
            }
            worker.send(header, body)

    def receive(self, worker: WorkerHandle, header: Header, body: Sequence[bytes]) -> None:
        """Take a frame about a job: `mark`, `queued`, `answer` or `error`."""
        job_id = header["id"]
        ticket = self._tickets.get(job_id)
        if ticket is not None and ticket.worker is not worker:
            ticket = None  # its caller has gone, or it is with another worker now
        if header["kind"] == "mark":
            self._mark(worker, job_id, header["change"])
            stage = header["stage"]
            if ticket is not None and header["change"] >= 0 and stage not in (None, ticket.job.progress.stage):
                ticket.job.progress.enter(stage)
        elif ticket is None:
            return
        elif header["kind"] == "queued":
            ticket.padded_pixels = (ticket.padded_pixels or 0) + header["pixels"]
            if ticket.job.progress.stage != "inference":  # that of another of its entries
                ticket.job.progress.enter("queue")
        else:
            self._settle(worker, ticket, header, body)

    def recover(self, worker: WorkerHandle, *, of_a_job: bool) -> None:
        """A worker has died: send its jobs to others, the suspects one at a time.

        Args:
            of_a_job: False if it is known that no job caused the death.
        """
        verdicts = self._blame.died(worker, of_a_job=of_a_job)
        for job_id, verdict in reversed(list(verdicts.items())):
            ticket = self._abandoned.pop(job_id, None)
            if ticket is not None:
                self._remember(ticket)
                self._blame.forget(job_id)
            elif (ticket := self._tickets.get(job_id)) is not None:
                ticket.worker, ticket.padded_pixels, ticket.is_resent = None, None, True
                ticket.job.progress.enter("decode")
                self._remember(ticket)
                if verdict is Verdict.CONVICT:
                    ticket.answer(_conviction())
                else:
                    self._router.retry(ticket)
        self._share_records()
        self.dispatch()

    def fail_all(self, error: ServiceError) -> None:
        """Answer every job with an error."""
        for ticket in self._tickets.values():
            ticket.answer(error)

    def is_at_risk(self, worker: WorkerHandle) -> bool:
        """Whether any job would be suspected if a worker died now."""
        return bool(self._blame.at_risk(worker))

    def tries_suspect(self, worker: WorkerHandle) -> bool:
        """Whether a worker has a suspect and nothing else."""
        return self._blame.tries_suspect(worker)

    def requests_at_risk(self, worker: WorkerHandle) -> Sequence[str]:
        """Ids of the requests that a worker is working on, even if their callers have gone; at most 20."""
        at_risk = [self._tickets.get(job) or self._abandoned.get(job) for job in self._blame.at_risk(worker)]
        return [ticket.request_id or "unnamed" for ticket in at_risk if ticket is not None][:_MOST_NAMED_REQUESTS]

    def waiting_pixels(self, model_key: str) -> Sequence[int]:
        """The resized and padded pixels of each image that waits for a device, for one model."""
        return [
            one.padded_pixels
            for one in self._tickets.values()
            if one.padded_pixels is not None and one.job.progress.stage == "queue" and one.job.model == model_key
        ]

    def _load_of(self, worker: WorkerHandle) -> Sequence[Ticket]:
        return [self._tickets[job] for job in self._blame.awaited(worker) if job in self._tickets]

    def _mark(self, worker: WorkerHandle, job_id: int, change: int) -> None:
        if change > 0:
            self._blame.marked(worker, job_id)
        elif change < 0:
            self._blame.unmarked(worker, job_id)
            if not self._blame.is_present(worker, job_id):
                # The work ended without killing the worker, although its caller had gone.
                if (ticket := self._abandoned.pop(job_id, None)) is not None:
                    self._known.forget(ticket.job)
                    self._blame.forget(job_id)
                self.dispatch()

    def _settle(self, worker: WorkerHandle, ticket: Ticket, header: Header, body: Sequence[bytes]) -> None:
        if header["kind"] == "answer":
            ticket.job.progress.enter("respond")
            ticket.job.progress.stage_seconds |= header["stage_seconds"]
            fields = header["answer"] | {"image_size": tuple(header["answer"]["image_size"])}
            outcome: Outcome = Answer(**fields, pieces=body)
        else:
            outcome = error_from(header["error"])
        self._leave_worker(ticket)
        if isinstance(outcome, OverloadedError) and ticket.is_resent:
            # It was accepted once, so it is not refused now: it waits until the worker has finished something else.
            self._router.retry(ticket)
            if self._blame.awaited(worker):
                return
        else:
            if isinstance(outcome, Answer | InvalidRequestError | InferenceError):
                # Its worker survived it.
                self._known.forget(ticket.job)
                self._blame.forget(ticket.id)
            ticket.answer(outcome)
        self.dispatch()

    def _close(self, ticket: Ticket) -> None:
        """A job is answered, or its caller has stopped waiting."""
        del self._tickets[ticket.id]
        self._router.withdraw(ticket)
        self._remember(ticket)
        if ticket.worker is not None:
            ticket.worker.send({"kind": "cancel", "id": ticket.id})
            self._leave_worker(ticket)
        if ticket.id not in self._abandoned:
            self._blame.forget(ticket.id)
        self.dispatch()

    def _leave_worker(self, ticket: Ticket) -> None:
        worker, ticket.worker = ticket.worker, None
        assert worker is not None
        self._blame.left(worker, ticket.id)
        if self._blame.is_present(worker, ticket.id):
            self._abandoned[ticket.id] = ticket

    def _remember(self, ticket: Ticket) -> None:
        """Keep a suspect's record after its request has ended."""
        if (deaths_alone := self._blame.deaths_alone(ticket.id)) is not None:
            self._known.remember(ticket.job, deaths_alone)

    def _share_records(self) -> None:
        """Apply what is known of a suspect to its waiting copies, too."""
        for ticket in list(self._router):
            deaths_alone = self._known.deaths_alone(ticket.job)
            if deaths_alone is None or deaths_alone == self._blame.deaths_alone(ticket.id):
                continue
            self._blame.suspect(ticket.id, deaths_alone=deaths_alone)
            self._router.withdraw(ticket)
            if deaths_alone >= MAX_DEATHS_ALONE:
                ticket.answer(_conviction())
            else:
                self._router.add(ticket)


def _conviction() -> PoisonousImageError:
    return PoisonousImageError(
        f"this image stopped the worker {MAX_DEATHS_ALONE} times, while it did nothing else; it is refused for "
        f"{REMEMBERED_SECONDS / 60:g} minutes"
    )
