"""Coroutines at a time, none of which outlives the call."""

from __future__ import annotations

import asyncio

import pytest

from service.tasks import all_of


async def test_results_come_in_order_and_no_more_run_at_a_time_than_allowed() -> None:
    running: set[int] = set()
    most = 0

    async def double(item: int) -> int:
        nonlocal most
        running.add(item)
        most = max(most, len(running))
        for _ in range(10 - item):
            await asyncio.sleep(0)
        running.remove(item)
        return 2 * item

    assert await all_of(double, list(range(10)), at_a_time=3) == [2 * item for item in range(10)]
    assert most == 3
    assert await all_of(double, []) == []


async def test_failure_of_one_ends_the_others_and_is_raised_as_it_was() -> None:
    ended: list[int] = []

    async def work(item: int) -> int:
        try:
            await asyncio.sleep(0 if item == 1 else 1000)
            raise ValueError("one of them") from KeyError("why")
        finally:
            ended.append(item)

    with pytest.raises(ValueError, match="one of them") as raised:
        await all_of(work, [0, 1, 2])
    assert sorted(ended) == [0, 1, 2]
    assert isinstance(raised.value.__cause__, KeyError)
