"""When requests are sent. A closed loop sends the next request when an answer arrives, like patient callers; an open
loop sends at a given rate (Poisson arrivals) however slow the answers are, like the public. Both measure from the
intended start, so that a stalled server is also charged for requests that could not be sent meanwhile. Times are in
seconds of the event loop's clock.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from service.load.client import NoAnswerError
from service.load.summary import Record, Sample

Send = Callable[[], Awaitable[int]]
"""Sends the next request and returns the status of its answer, or raises NoAnswerError."""
_PAUSE_SECONDS = 0.1


async def closed_loop(send: Send, record: Record, *, concurrency: int, seconds: float) -> None:
    """Keep `concurrency` requests in flight for `seconds`, then wait for the last answers. A caller whose connection is
    refused pauses: there may be no server for a while, and the attempts would only count how fast they fail.
    """
    now = asyncio.get_running_loop().time
    begin = now()

    async def caller() -> None:
        while (intended := now()) < begin + seconds:
            if await send_one(send, record, begin=begin, intended=intended) == "refused":
                await asyncio.sleep(_PAUSE_SECONDS)

    async with asyncio.TaskGroup() as callers:
        for _ in range(concurrency):
            callers.create_task(caller())


async def open_loop(send: Send, record: Record, *, rate: float, seconds: float, seed: int = 0) -> None:
    """Send `rate` requests per second on average, independently of each other, then wait for the last answers.

    Args:
        rate: requests per second.
        seed: the same seed gives the same times.
    """
    now = asyncio.get_running_loop().time
    gaps = random.Random(seed)
    begin = now()
    intended = begin + gaps.expovariate(rate)
    async with asyncio.TaskGroup() as requests:
        while intended < begin + seconds:
            if (ahead := intended - now()) > 0:
                await asyncio.sleep(ahead)
            requests.create_task(send_one(send, record, begin=begin, intended=intended))
            intended += gaps.expovariate(rate)


async def send_one(send: Send, record: Record, *, begin: float, intended: float) -> str:
    """Send the next request; record and return its outcome.

    Args:
        begin: when the load began.
        intended: when the request should be sent, now or earlier.
    """
    now = asyncio.get_running_loop().time
    sent = now()
    record.in_flight += 1
    try:
        outcome = str(await send())
    except NoAnswerError as error:
        outcome = error.reason
    finally:
        record.in_flight -= 1
    record.samples.append(Sample(intended - begin, sent - begin, now() - begin, outcome))
    return outcome
