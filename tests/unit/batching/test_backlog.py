"""How long the backlog takes, on a clock that only the test moves."""

from __future__ import annotations

import random

import pytest

from service.batching.backlog import SAFETY, Backlog


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def measured(clock: Clock, *, seconds: float, cost: int = 10, jobs: int = 100) -> Backlog:
    """A backlog that has seen jobs of one cost take so long, one after the other."""
    backlog = Backlog(clock=clock)
    for _ in range(jobs):
        backlog.add(cost)
        clock.now += seconds
        backlog.remove(cost, work=cost)
        clock.now += 1000  # idle: no job waits, so this says nothing about the speed
    return backlog


def test_time_is_that_of_all_that_is_under_way_and_the_job_itself() -> None:
    clock = Clock()
    backlog = measured(clock, seconds=2)
    for _ in range(3):
        backlog.add(20)
    assert backlog.seconds_until_done(10) == pytest.approx((3 * 20 + 10) * 2 / 10)
    assert backlog.is_in_time(10, seconds_left=14 / SAFETY + 0.01)
    assert not backlog.is_in_time(10, seconds_left=14 / SAFETY - 0.01)


def test_what_is_alone_is_always_tried() -> None:
    assert measured(Clock(), seconds=100).is_in_time(10, seconds_left=0.1)


def test_jobs_that_are_done_together_count_together() -> None:
    """Four that share a batch of two seconds: half a second each, not two."""
    clock = Clock()
    backlog = Backlog(clock=clock)
    for _ in range(100):
        for _ in range(4):
            backlog.add(10)
        clock.now += 2
        for _ in range(4):
            backlog.remove(10, work=10)
    backlog.add(10)
    assert backlog.seconds_until_done(10) == pytest.approx(1, rel=0.2)


def test_before_anything_was_measured_a_few_are_taken_and_many_are_guessed_at() -> None:
    backlog = Backlog()
    for _ in range(8):
        assert backlog.is_in_time(10, seconds_left=0.01)
        backlog.add(10)
    assert not backlog.is_in_time(10, seconds_left=0.01)
    assert backlog.is_in_time(10, seconds_left=30)


def test_time_that_was_spent_in_vain_counts_and_who_leaves_does_not() -> None:
    clock = Clock()
    left, late = measured(clock, seconds=1), measured(clock, seconds=1)
    for backlog, work in ((left, None), (late, 0)):
        for _ in range(10):
            backlog.add(10)
            clock.now += 1
            backlog.remove(10, work=work)
        backlog.add(10)
    assert left.seconds_until_done(10) == pytest.approx(2)
    assert late.seconds_until_done(10) > 2.5


def test_a_slow_moment_is_forgotten() -> None:
    clock = Clock()
    backlog = measured(clock, seconds=1)
    for seconds in [60] + [1] * 150:
        backlog.add(10)
        clock.now += seconds
        backlog.remove(10, work=10)
    backlog.add(10)
    assert backlog.seconds_until_done(10) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("threads", [1, 4])
def test_of_what_is_taken_under_overload_hardly_any_is_late_and_no_server_idles(threads: int) -> None:
    """Ten times what some servers of whatever kind can do, with sizes of 1 to 30 and deadlines of 8 to 60 seconds."""
    clock, chance = Clock(), random.Random(0)
    backlog = Backlog(clock=clock)
    waiting: list[tuple[int, float]] = []
    running: list[tuple[float, int, float]] = []  # ends at, cost, deadline
    late = taken = idle = 0
    for tick in range(20_000):
        clock.now = tick / 10
        for ends_at, cost, deadline in [one for one in running if one[0] <= clock.now]:
            running.remove((ends_at, cost, deadline))
            is_late = deadline < clock.now
            backlog.remove(cost, work=0 if is_late else cost)
            late += is_late
        for _ in range(threads):
            if chance.random() < 2 / 3:  # ten jobs in the 1.5 seconds that one takes on average
                cost, seconds_left = chance.choice([1, 2, 2, 3, 30]), chance.uniform(8, 60)
                if backlog.count < 72 * threads and backlog.is_in_time(cost, seconds_left):
                    backlog.add(cost)
                    waiting.append((cost, clock.now + seconds_left))
                    taken += 1
        while waiting and len(running) < threads:
            cost, deadline = waiting.pop(0)
            running.append((clock.now + cost * 1.5 / 7.6, cost, deadline))
        idle += len(running) < threads
    assert late <= 0.01 * taken
    assert idle <= 0.02 * 20_000


def test_many_deadlines_of_a_millisecond_do_not_replace_what_was_measured() -> None:
    clock = Clock()
    backlog = measured(clock, seconds=2)
    for _ in range(1000):
        backlog.add(10)
        clock.now += 0.001
        backlog.remove(10, work=0)
    assert backlog.seconds_until_done(10) == pytest.approx(2, rel=0.1)
