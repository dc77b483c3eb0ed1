"""Which job is to blame when a worker dies: a state machine over plain identifiers, without processes or an event loop.

Workers report each piece of work on a job before they start it and soon after they end it. Jobs that were being worked
on when their worker died are suspects. A suspect is retried alone, in a worker that does nothing else; a job that is
alone for `MAX_DEATHS_ALONE` deaths is convicted. All other jobs are resent as if nothing had happened.

A job whose caller has gone stays present in its worker until the work on it has ended: it may still kill the worker,
and until then no other job is alone there.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

MAX_DEATHS_ALONE = 2


class Verdict(Enum):
    """What happens to a job whose worker died."""

    RESEND = "resend"
    """To any worker: it is not a suspect."""

    ALONE = "alone"
    """To a worker that does nothing else: it is a suspect."""

    CONVICT = "convict"
    """To no worker: it is the cause."""


@dataclass(slots=True)
class _Presence:
    """A job in a worker.

    Attributes:
        marks: how many threads of the worker are at work on it.
        is_awaited: whether its caller still waits for the answer.
    """

    marks: int = 0
    is_awaited: bool = True

    @property
    def is_over(self) -> bool:
        """Whether the worker has nothing more to do with it."""
        return self.marks == 0 and not self.is_awaited


class Blame:
    """See the module. Jobs are numbers, workers any hashable objects."""

    def __init__(self) -> None:
        self._present: dict[Hashable, dict[int, _Presence]] = {}
        self._deaths_alone: dict[int, int] = {}  # of suspects

    def suspect(self, job: int, *, deaths_alone: int = 0) -> None:
        """Treat a job as a suspect from now on.

        Args:
            deaths_alone: in how many deaths it, or a copy of it, was alone in the worker.
        """
        self._deaths_alone[job] = max(deaths_alone, self._deaths_alone.get(job, 0))

    def forget(self, job: int) -> None:
        """A job is finished, or has proved harmless: drop its record."""
        self._deaths_alone.pop(job, None)

    def deaths_alone(self, job: int) -> int | None:
        """In how many deaths a suspect was alone; None for a job that is not a suspect."""
        return self._deaths_alone.get(job)

    def sent(self, worker: Hashable, job: int) -> None:
        """A worker was given a job."""
        self._present.setdefault(worker, {}).setdefault(job, _Presence()).is_awaited = True

    def marked(self, worker: Hashable, job: int) -> None:
        """A thread of the worker begins to work on a job."""
        jobs = self._present.setdefault(worker, {})
        # If the job is new here, its caller has gone: the worker began before it learned that.
        jobs.setdefault(job, _Presence(is_awaited=False)).marks += 1

    def unmarked(self, worker: Hashable, job: int) -> None:
        """A thread of the worker has ended its work on a job."""
        if (presence := self._present.get(worker, {}).get(job)) is not None:
            presence.marks -= 1
            self._clear(worker, job)

    def left(self, worker: Hashable, job: int) -> None:
        """A job was answered by its worker, or its caller has stopped waiting."""
        if (presence := self._present.get(worker, {}).get(job)) is not None:
            presence.is_awaited = False
            self._clear(worker, job)

    def died(self, worker: Hashable, *, of_a_job: bool = True) -> Mapping[int, Verdict]:
        """A worker has died.

        Args:
            of_a_job: False if it is known that no job caused the death.

        Returns:
            For each job that was present, in the order in which they were sent, what happens to it if its caller still
            waits.
        """
        present = self._present.pop(worker, {})
        is_alone = len(present) == 1
        verdicts = {}
        for job, presence in present.items():
            if of_a_job and presence.marks > 0:
                self.suspect(job, deaths_alone=self._deaths_alone.get(job, 0) + is_alone)
            deaths_alone = self._deaths_alone.get(job)
            if deaths_alone is None:
                verdicts[job] = Verdict.RESEND
            else:
                verdicts[job] = Verdict.CONVICT if deaths_alone >= MAX_DEATHS_ALONE else Verdict.ALONE
        return verdicts

    def awaited(self, worker: Hashable) -> Sequence[int]:
        """The jobs of a worker whose callers still wait, in the order in which they were sent."""
        return [job for job, presence in self._present.get(worker, {}).items() if presence.is_awaited]

    def at_risk(self, worker: Hashable) -> Sequence[int]:
        """The jobs that a worker is working on: these would be the suspects if it died now."""
        return [job for job, presence in self._present.get(worker, {}).items() if presence.marks > 0]

    def is_present(self, worker: Hashable, job: int) -> bool:
        """Whether a worker may still work on a job."""
        return job in self._present.get(worker, {})

    def is_vacant(self, worker: Hashable) -> bool:
        """Whether a worker has nothing to do, so that a suspect would be alone in it."""
        return not self._present.get(worker)

    def tries_suspect(self, worker: Hashable) -> bool:
        """Whether a worker has a suspect; it must then get no other job."""
        return not self._deaths_alone.keys().isdisjoint(self._present.get(worker, {}))

    def _clear(self, worker: Hashable, job: int) -> None:
        if self._present[worker][job].is_over:
            del self._present[worker][job]
