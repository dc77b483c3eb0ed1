"""Runs work for a caller that may hang up, only for as long as the caller waits."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from service.errors import CancelledRequestError

T = TypeVar("T")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await the work, and cancel it when the caller goes away.

    Args:
        request: its body must have been read, so that the next message can only be a disconnect.

    Raises:
        CancelledRequestError: the caller has gone.
    """
    tasks = working, watching = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise CancelledRequestError("the caller went away")
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.wait(tasks)
