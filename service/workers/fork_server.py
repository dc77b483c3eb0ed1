"""Starts processes by multiprocessing's fork server, and replaces the fork server if it hangs."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess

logger = logging.getLogger(__name__)

# Before its first process the fork server imports torch, which takes a minute on a busy machine; then it only forks.
_FIRST_START_SECONDS = 300.0
_START_SECONDS = 30.0

# The fork server that has started a process before.
_proven: int | None = None


def start_process(process: BaseProcess) -> None:
    """Start a process, and the fork server before the first one, with SIGINT and SIGTERM blocked: terminals and service
    managers signal the whole process group, but only the process that serves HTTP knows how to drain. Blocks.

    Raises:
        OSError, EOFError: there are no descriptors or no memory for it, or the fork server has ended.
    """
    global _proven
    # Otherwise starting the fork server would start the resource tracker, in this thread, which unblocks the signals.
    resource_tracker.ensure_running()
    signals = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        process.start()
        _proven = _pid()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def until_started(starting: asyncio.Future[None]) -> None:
    """Wait until `start_process`, which runs in a thread, has returned or raised. A fork server that hangs is killed;
    then the start fails, and the next one starts another fork server.
    """
    seconds = _FIRST_START_SECONDS if _proven is None or _proven != _pid() else _START_SECONDS
    while not (await asyncio.wait([starting], timeout=seconds))[0]:
        pid = _pid()
        logger.error("fork server hangs", extra={"fields": {"pid": pid, "seconds": seconds}})
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _pid() -> int | None:
    """The process id of the fork server; None before the first start."""
    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]  # as private as its module
    return pid
