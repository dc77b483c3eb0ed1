"""The promises of `MemoryLimit`, on integers and a clock that only the test moves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.batching.memory_limit import FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, MemoryLimit


def test_limit_falls_to_half_of_what_failed_and_doubles_after_a_while() -> None:
    limit = MemoryLimit(100)
    assert limit.at(0) == 100
    limit.lower(80, now=0)
    assert limit.at(FIRST_WAIT_SECONDS - 1) == 40
    assert limit.at(FIRST_WAIT_SECONDS) == 80
    assert limit.at(2 * FIRST_WAIT_SECONDS) == 100


def test_failure_under_a_limit_that_fell_meanwhile_never_raises_it() -> None:
    limit = MemoryLimit(100)
    limit.lower(20, now=0)
    limit.lower(90, now=0)
    assert limit.at(0) == 10


def test_rise_in_vain_makes_the_next_wait_twice_as_long() -> None:
    limit = MemoryLimit(8)
    now = 0.0
    for wait_seconds in (60, 120, 240, 480, 960, 1920, 3600, 3600):
        limit.lower(8, now)
        assert limit.at(now + wait_seconds - 1) == 4
        now += wait_seconds
        assert limit.at(now) == 8
    # What went well for so long was no rise in vain: the next shortage is a new one.
    now += LONGEST_WAIT_SECONDS
    limit.lower(8, now)
    assert limit.at(now + FIRST_WAIT_SECONDS) == 8


@given(max_batch_cost=st.integers(1, 64), memory=st.integers(1, 64))
def test_shortage_that_stays_costs_few_failures_and_half_the_batch_at_most(max_batch_cost: int, memory: int) -> None:
    """A day of full batches of one-pixel items, one a minute, on a device that holds `memory` of them."""
    limit, failures = MemoryLimit(max_batch_cost), 0
    for now in range(0, 24 * 3600, 60):
        cost = limit.at(now)
        if cost > memory and cost > 1:
            limit.lower(cost, now)
            failures += 1
        else:
            assert cost <= max_batch_cost
            assert 2 * cost >= min(memory, max_batch_cost) - 1
    assert failures <= 6 + 6 + 24  # on the way down, while the waits grow, and one an hour


@given(max_batch_cost=st.integers(1, 64), failed_costs=st.lists(st.integers(1, 64), max_size=20))
def test_limit_returns_when_the_shortage_is_over(max_batch_cost: int, failed_costs: list[int]) -> None:
    limit = MemoryLimit(max_batch_cost)
    now = 0.0
    for cost in failed_costs:
        limit.lower(cost, now)
        assert 1 <= limit.at(now) <= max_batch_cost
        now += 30
    for _ in range(6):
        now += LONGEST_WAIT_SECONDS
        limit.at(now)
    assert limit.at(now) == max_batch_cost
