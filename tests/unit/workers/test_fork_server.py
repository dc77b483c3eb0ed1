"""Processes are started by a fork server, also after it has stood still."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess

import pytest

from service.workers import fork_server
from service.workers.fork_server import start_process, until_started


async def started() -> BaseProcess:
    process = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(0,))
    starting = asyncio.ensure_future(asyncio.to_thread(start_process, process))
    await until_started(starting)
    starting.result()
    return process


async def test_fork_server_that_stands_still_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    (await started()).join()
    stopped = fork_server._pid()
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    with monkeypatch.context() as patched, pytest.raises((OSError, EOFError)):
        patched.setattr(fork_server, "_START_SECONDS", 0.01)
        await started()
    process = None
    while process is None:
        with suppress(OSError):  # while the killed one ends; supervisors try again, too
            process = await started()
    process.join()
    assert (process.exitcode, fork_server._pid() == stopped) == (0, False)
