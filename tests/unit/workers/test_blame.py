"""Who is to blame for a death: whatever happens in whatever order, no innocent job is convicted, no guilty one ends
more workers than the bound, and none is lost.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.workers.blame import MAX_DEATHS_ALONE, Blame, Verdict
from service.workers.routing import Router

WORKER, OTHER = "worker", "other"
# One death beside other jobs, and those at which it is alone.
MOST_DEATHS = 1 + MAX_DEATHS_ALONE


def test_job_that_only_waited_is_resent() -> None:
    blame = Blame()
    for job in (1, 2):
        blame.sent(WORKER, job)
    blame.marked(WORKER, 1)
    assert blame.died(WORKER) == {1: Verdict.ALONE, 2: Verdict.RESEND}
    assert (blame.deaths_alone(1), blame.deaths_alone(2)) == (0, None)


def test_job_that_is_alone_at_two_deaths_is_convicted() -> None:
    blame = Blame()
    for verdict in (Verdict.ALONE, Verdict.CONVICT):
        blame.sent(WORKER, 1)
        blame.marked(WORKER, 1)
        assert blame.died(WORKER) == {1: verdict}


def test_job_of_several_parts_is_at_risk_until_the_last_one_has_ended() -> None:
    blame = Blame()
    blame.sent(WORKER, 1)
    blame.marked(WORKER, 1)
    blame.marked(WORKER, 1)
    blame.unmarked(WORKER, 1)
    assert blame.at_risk(WORKER) == [1]
    blame.unmarked(WORKER, 1)
    assert blame.at_risk(WORKER) == []
    assert blame.died(WORKER) == {1: Verdict.RESEND}


def test_job_that_nobody_waits_for_counts_until_the_work_on_it_has_ended() -> None:
    blame = Blame()
    blame.sent(WORKER, 1)
    blame.marked(WORKER, 1)
    blame.left(WORKER, 1)
    blame.sent(WORKER, 2)
    blame.marked(WORKER, 2)
    assert blame.awaited(WORKER) == [2]
    assert blame.at_risk(WORKER) == [1, 2]
    blame.unmarked(WORKER, 1)
    assert blame.died(WORKER) == {2: Verdict.ALONE}
    assert blame.deaths_alone(2) == 1


def test_work_that_began_before_its_worker_learned_that_nobody_waits_counts_too() -> None:
    blame = Blame()
    blame.sent(WORKER, 1)
    blame.left(WORKER, 1)
    assert blame.is_vacant(WORKER)
    blame.marked(WORKER, 1)
    assert not blame.is_vacant(WORKER)
    blame.unmarked(WORKER, 1)
    assert blame.is_vacant(WORKER)


def test_death_for_a_cause_that_is_known_speaks_against_no_job() -> None:
    blame = Blame()
    blame.sent(WORKER, 1)
    blame.marked(WORKER, 1)
    assert blame.died(WORKER, of_a_job=False) == {1: Verdict.RESEND}


def test_suspect_stays_one_until_it_has_proved_harmless() -> None:
    blame = Blame()
    blame.suspect(1, deaths_alone=1)
    blame.sent(WORKER, 1)
    assert blame.tries_suspect(WORKER)
    assert blame.died(WORKER) == {1: Verdict.ALONE}  # before it was begun
    blame.forget(1)
    blame.sent(OTHER, 1)
    assert not blame.tries_suspect(OTHER)


@dataclass(eq=False)
class Task:
    """A job of the machine below.

    Attributes:
        is_guilty: whether every worker that works on it dies before it is done.
        deaths: of workers that died of it.
        accidents_alone: deaths without a cause at which it was alone and worked on.
        end: how it ended.
    """

    id: int
    is_guilty: bool
    model: str = "m"
    is_bulk: bool = False
    cost: int = 1
    entries: int = 1
    deaths: int = 0
    accidents_alone: int = 0
    end: str | None = None


@dataclass(eq=False)
class Worker:
    """Its threads at work, by job."""

    models: tuple[str, ...] = ("m",)
    marks: Counter[int] = field(default_factory=Counter)


class Play(RuleBasedStateMachine):
    """Jobs and workers under any order of events. A guilty job never ends well: its worker dies of it, sooner or later,
    or by accident first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blame = Blame()
        self.router: Router[Worker, Task] = Router(self.blame, max_jobs=4)
        self.tasks: dict[int, Task] = {}
        self.ids = itertools.count()
        self.workers = [Worker(), Worker()]

    @rule(is_guilty=st.sampled_from([False, False, False, True]))
    def submit(self, is_guilty: bool) -> None:
        task = self.tasks[next(self.ids)] = Task(len(self.tasks), is_guilty)
        self.router.add(task)
        self.assign()

    @rule(choice=st.integers(0, 99))
    def begin(self, choice: int) -> None:
        """A thread begins to work on a job."""
        places = [(worker, job) for worker in self.workers for job in self.blame.awaited(worker)]
        if places:
            worker, job = places[choice % len(places)]
            worker.marks[job] += 1
            self.blame.marked(worker, job)

    @rule(choice=st.integers(0, 99))
    def end(self, choice: int) -> None:
        """It is done with it; never with a guilty one."""
        places = [(worker, job) for worker in self.workers for job in +worker.marks if not self.tasks[job].is_guilty]
        if places:
            self.unmark(*places[choice % len(places)])

    @rule(choice=st.integers(0, 99))
    def answer(self, choice: int) -> None:
        """A worker answers a job, perhaps while threads are still at work on it."""
        places = [
            (worker, job)
            for worker in self.workers
            for job in self.blame.awaited(worker)
            if not self.tasks[job].is_guilty
        ]
        if places:
            worker, job = places[choice % len(places)]
            self.tasks[job].end = "answered"
            self.blame.left(worker, job)
            self.blame.forget(job)
            self.assign()

    @rule(choice=st.integers(0, 99))
    def cancel(self, choice: int) -> None:
        """A caller goes away."""
        if open_tasks := [task for task in self.tasks.values() if task.end is None]:
            task = open_tasks[choice % len(open_tasks)]
            task.end = "cancelled"
            self.router.withdraw(task)
            for worker in self.workers:
                self.blame.left(worker, task.id)
            self.assign()

    @rule(choice=st.integers(0, 99))
    def strike(self, choice: int) -> None:
        """A worker dies of a guilty job."""
        places = [(worker, job) for worker in self.workers for job in +worker.marks if self.tasks[job].is_guilty]
        if places:
            worker, job = places[choice % len(places)]
            self.tasks[job].deaths += 1
            self.die(worker)

    @rule(choice=st.integers(0, 1))
    def accident(self, choice: int) -> None:
        """A worker dies of nothing."""
        worker = self.workers[choice]
        if len(present := self.present(worker)) == 1 and worker.marks[present[0]] > 0:
            self.tasks[present[0]].accidents_alone += 1
        self.die(worker)

    @invariant()
    def none_is_lost(self) -> None:
        waiting = [task.id for task in self.router]
        held = [job for worker in self.workers for job in self.blame.awaited(worker)]
        assert sorted(waiting + held) == [task.id for task in self.tasks.values() if task.end is None]

    @invariant()
    def none_is_wronged_and_none_escapes(self) -> None:
        for task in self.tasks.values():
            if task.end == "convicted" and not task.is_guilty:
                # Only chance can convict it: two accidents, or one and a death that it shared with nobody.
                assert task.accidents_alone >= MAX_DEATHS_ALONE
            assert task.deaths <= MOST_DEATHS

    @invariant()
    def suspects_are_alone(self) -> None:
        for worker in self.workers:
            if self.blame.tries_suspect(worker):
                assert len(self.present(worker)) == 1

    @invariant()
    def nothing_waits_while_a_worker_has_nothing_to_do(self) -> None:
        if any(map(self.blame.is_vacant, self.workers)):
            assert not list(self.router)

    def teardown(self) -> None:
        """Every job ends, as it deserves, when what can happen has happened."""
        for _ in range(1000):
            if all(task.end for task in self.tasks.values()):
                break
            for worker in list(self.workers):
                for job in self.blame.awaited(worker):
                    worker.marks[job] += 1
                    self.blame.marked(worker, job)
                guilty = [job for job in +worker.marks if self.tasks[job].is_guilty]
                if guilty:
                    self.tasks[guilty[0]].deaths += 1
                    self.die(worker)
                else:
                    for job in self.blame.awaited(worker):
                        self.tasks[job].end = "answered"
                        self.blame.left(worker, job)
                        self.blame.forget(job)
                    for job in list(worker.marks.elements()):
                        self.unmark(worker, job)
            self.assign()
        self.none_is_wronged_and_none_escapes()
        for task in self.tasks.values():
            expected = "convicted" if task.is_guilty else "answered"
            assert task.end in (expected, "cancelled") or task.accidents_alone

    def assign(self) -> None:
        for worker, task in self.router.assign(self.workers, self.load):
            assert self.blame.is_present(worker, task.id)

    def load(self, worker: Worker) -> list[Task]:
        return [self.tasks[job] for job in self.blame.awaited(worker)]

    def present(self, worker: Worker) -> list[int]:
        return [job for job in self.tasks if self.blame.is_present(worker, job)]

    def unmark(self, worker: Worker, job: int) -> None:
        worker.marks[job] -= 1
        self.blame.unmarked(worker, job)
        self.assign()

    def die(self, worker: Worker) -> None:
        self.workers[self.workers.index(worker)] = Worker()
        for job, verdict in reversed(list(self.blame.died(worker).items())):
            task = self.tasks[job]
            if task.end is not None:
                self.blame.forget(job)
            elif verdict is Verdict.CONVICT:
                task.end = "convicted"
                self.blame.forget(job)
            else:
                self.router.retry(task)
        self.assign()


TestPlay = Play.TestCase
TestPlay.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("innocents", [0, 3])
def test_guilty_job_ends_at_most_three_workers(innocents: int) -> None:
    blame = Blame()
    router: Router[Worker, Task] = Router(blame, max_jobs=10)
    tasks = [Task(0, True), *(Task(1 + index, False) for index in range(innocents))]
    for task in tasks:
        router.add(task)
    deaths = 0
    verdict = Verdict.ALONE
    while verdict is not Verdict.CONVICT:
        worker = Worker()
        router.assign([worker], lambda worker: [tasks[job] for job in blame.awaited(worker)])
        for job in blame.awaited(worker):
            blame.marked(worker, job)
        if not blame.is_present(worker, 0):
            for job in blame.awaited(worker):  # an innocent suspect
                blame.forget(job)
            continue
        verdicts = blame.died(worker)
        deaths += 1
        verdict = verdicts[0]
        for job, one in verdicts.items():
            if one is not Verdict.CONVICT:
                router.retry(tasks[job])
    assert deaths == MOST_DEATHS - (innocents == 0)
