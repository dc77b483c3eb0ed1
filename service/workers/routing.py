"""Decides which worker gets which job: suspects go one at a time to workers with nothing else to do, all other jobs to
the worker with the fewest pixels to process. Knows neither processes nor an event loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from service.workers.blame import Blame


class Routed(Protocol):
    """What routing needs to know of a job."""

    @property
    def id(self) -> int:
        """Unique among all jobs."""

    @property
    def model(self) -> str:
        """The key of the model that it needs."""

    @property
    def is_bulk(self) -> bool:
        """Its priority."""

    @property
    def entries(self) -> int:
        """How many places it needs in a worker."""

    @property
    def cost(self) -> int:
        """In pixels; may be a guess."""


class Able(Protocol):
    """What routing needs to know of a worker that takes jobs."""

    @property
    def models(self) -> Container[str]:
        """The keys of what it has loaded."""

    def __hash__(self) -> int:
        """Workers are told apart by identity."""


J = TypeVar("J", bound=Routed)
W = TypeVar("W", bound=Able)


class Router(Generic[W, J]):
    """Holds the jobs that wait for a worker, and chooses their workers.

    Args:
        max_jobs: places for jobs of each priority in one worker.
    """

    def __init__(self, blame: Blame, *, max_jobs: int) -> None:
        self._blame = blame
        self._max_jobs = max_jobs
        self._pending: deque[J] = deque()
        self._suspects: deque[J] = deque()
        # This worker gets no new jobs, so that it becomes vacant for a suspect.
        self._emptied: W | None = None

    def __iter__(self) -> Iterator[J]:
        yield from self._pending
        yield from self._suspects

    def add(self, job: J) -> None:
        """Add a new job, behind all others."""
        line = self._pending if self._blame.deaths_alone(job.id) is None else self._suspects
        line.append(job)

    def retry(self, job: J) -> None:
        """Put back a job that comes back from a worker, in front of new ones."""
        deaths_alone = self._blame.deaths_alone(job.id)
        if deaths_alone is None:
            self._pending.appendleft(job)
        elif deaths_alone == 0:
            self._suspects.appendleft(job)
        else:
            self._suspects.append(job)  # behind the other suspects: it has already had a try alone

    def withdraw(self, job: J) -> None:
        """Forget a job, if it waits."""
        for line in (self._pending, self._suspects):
            if job in line:
                line.remove(job)

    def assign(self, workers: Sequence[W], load: Callable[[W], Sequence[J]]) -> Sequence[tuple[W, J]]:
        """Assign waiting jobs to workers, as far as possible.

        Args:
            workers: those that take jobs.
            load: returns the jobs that a worker has, without those whose callers have gone.

        Returns:
            Which worker to send which job, in order.
        """
        if not self._pending and not self._suspects:
            return []
        loads = {worker: list(load(worker)) for worker in workers}
        return [*self._assign_suspects(loads), *self._assign_others(loads)]

    def _assign_suspects(self, loads: Mapping[W, list[J]]) -> Iterator[tuple[W, J]]:
        for worker, jobs in loads.items():
            if self._blame.is_vacant(worker) and (suspect := self._suspect_for(worker)) is not None:
                self._suspects.remove(suspect)
                self._blame.sent(worker, suspect.id)
                jobs.append(suspect)
                yield worker, suspect
        able = [worker for worker in loads if self._suspect_for(worker) is not None]
        if not able or any(map(self._blame.tries_suspect, loads)):
            self._emptied = None
        elif self._emptied not in able:
            self._emptied = min(able, key=lambda worker: _cost(loads[worker]))

    def _assign_others(self, loads: Mapping[W, list[J]]) -> Iterator[tuple[W, J]]:
        waiting, self._pending = self._pending, deque()
        for job in waiting:
            able = [worker for worker, jobs in loads.items() if self._may_take(worker, jobs, job)]
            if not able:
                self._pending.append(job)
                continue
            chosen = min(able, key=lambda worker: _cost(loads[worker]))
            self._blame.sent(chosen, job.id)
            loads[chosen].append(job)
            yield chosen, job

    def _suspect_for(self, worker: W) -> J | None:
        return next((job for job in self._suspects if job.model in worker.models), None)

    def _may_take(self, worker: W, jobs: Sequence[J], job: J) -> bool:
        return (
            job.model in worker.models
            and worker is not self._emptied
            and not self._blame.tries_suspect(worker)
            and job.entries + sum(other.entries for other in jobs if other.is_bulk is job.is_bulk) <= self._max_jobs
        )


def _cost(jobs: Sequence[Routed]) -> int:
    return sum(job.cost for job in jobs)
