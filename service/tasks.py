"""Several coroutines at a time, of which none outlives the call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")


async def all_of(
    function: Callable[[S], Coroutine[Any, Any, T]], items: Sequence[S], *, at_a_time: int | None = None
) -> list[T]:
    """Await a function of each item; if one fails, cancel the others and raise its error once they have ended.

    Args:
        at_a_time: how many are under way at a time; None for all.

    Returns:
        The results, in the order of the items.
    """
    results: dict[int, T] = {}
    waiting = iter(enumerate(items))

    async def work() -> None:
        for index, item in waiting:
            results[index] = await function(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_a_time or len(items), len(items))):
                group.create_task(work())
    except BaseExceptionGroup as failed:
        error = failed.exceptions[0]
        raise error from error.__cause__
    return [results[index] for index in range(len(items))]
