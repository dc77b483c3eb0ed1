"""One worker process as its supervisor sees it; here the other end of its socket is the test's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest
import uvloop

from service.workers.channel import BlockingChannel
from service.workers.handle import WorkerHandle


@pytest.mark.parametrize("new_event_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_what_a_worker_sent_before_it_died_is_read_though_writing_to_it_fails_first(
    new_event_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """As on a busy machine, where this process has not read yet what the worker said last."""

    async def outlive() -> list[tuple[str, int]]:
        received: list[tuple[str, int]] = []
        handle = WorkerHandle(lambda _, header, body: received.append((header["kind"], sum(map(len, body)))))
        ours, theirs = socket.socketpair()
        await handle.connect(ours)
        channel = BlockingChannel(theirs, later=lambda flush: None)
        channel.send({"kind": "mark"})
        channel.send({"kind": "answer"}, bytes(100_000))
        theirs.close()
        handle.send({"kind": "job"})
        await handle.ended.wait()
        return received

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        assert runner.run(outlive()) == [("mark", 0), ("answer", 100_000)]
