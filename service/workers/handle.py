"""One worker process, seen from its supervisor: start it, talk to it, notice its end. Runs on the event loop; knows
frames and processes, nothing of jobs.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess

from service.cores import Share
from service.errors import NotReadyError
from service.settings import Settings
from service.structures import ModelInfo
from service.workers.channel import FrameReader, Header, error_from, pack
from service.workers.detector import PredictorFactory
from service.workers.fork_server import start_process, until_started

_READ_BYTES = 256 * 1024
# How long a worker may take to end after its socket was closed.
_LEAVE_SECONDS = 5.0
# The frames that answer `ask`.
_REPLIES = ("pong", "loaded", "unloaded", "refused")


class WorkerHandle(asyncio.Protocol):
    """See the module.

    Args:
        receive: takes every frame but the replies to `ask`.

    Attributes:
        models: what it has loaded, by key; empty until it is ready.
        memory: bytes by device and kind, as of the last ping.
        is_ready: whether it takes jobs.
        has_been_of_use: whether it has answered a job, or run well for a while.
        was_killed_for: why its supervisor killed it, in a word.
        got_ready: set when it becomes ready.
        ended: set when the process has ended or is about to.
    """

    def __init__(self, receive: Callable[[WorkerHandle, Header, Sequence[bytes]], None]) -> None:
        self.models: dict[str, ModelInfo] = {}
        self.memory: Mapping[tuple[str, str], float] = {}
        self.is_ready = False
        self.has_been_of_use = False
        self.was_killed_for: str | None = None
        self.got_ready = asyncio.Event()
        self.ended = asyncio.Event()
        self._receive = receive
        self._reader = FrameReader()
        self._ids = itertools.count()
        self._questions: dict[int, asyncio.Future[Header]] = {}
        self._process: BaseProcess | None = None
        self._starting: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._socket: socket.socket | None = None

    async def start(self, settings: Settings, factory: PredictorFactory, share: Share | None = None) -> None:
        """Start the process; afterwards either `got_ready` or `ended` is set.

        Args:
            share: what it gets of the CPU, if it runs its models there; all of it by default.
        """
        ours, theirs = socket.socketpair()
        process = multiprocessing.get_context("forkserver").Process(
            target=_run_worker, args=(theirs, settings, factory, share or Share()), daemon=True
        )
        self._process = process
        # In a thread, since starting it blocks until the fork server has imported its preloaded modules.
        self._starting = asyncio.ensure_future(asyncio.to_thread(start_process, process))
        try:
            await until_started(self._starting)
            self._starting.result()
            await self.connect(ours)
        except BaseException:
            ours.close()
            raise
        finally:
            if self._starting.done():
                theirs.close()
            else:
                self._starting.add_done_callback(lambda _: theirs.close())

    async def connect(self, end: socket.socket) -> None:
        """Talk to the process at the other end of a socket."""
        self._socket = end
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=end)

    @property
    def pending_commands(self) -> int:
        """How many calls of `ask` are waiting for a reply."""
        return len(self._questions)

    @property
    def pid(self) -> int | None:
        """The process id; None before it is started."""
        return None if self._process is None else self._process.pid

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # it is a stream's
        """Called by asyncio."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        for header, body in self._reader.feed(data):
            if header["kind"] not in _REPLIES:
                self._receive(self, header, body)
                continue
            question = self._questions.pop(header["id"], None)
            if question is not None and not question.done():
                question.set_result(header)

    def connection_lost(self, error: Exception | None) -> None:
        """Called by asyncio: the process has ended, or is about to."""
        self.is_ready = False
        self._read_rest()
        self.ended.set()
        for question in self._questions.values():
            if not question.done():
                question.set_exception(NotReadyError("the worker stopped meanwhile; try again"))

    def _read_rest(self) -> None:
        """Read what the process sent before it ended: event loops do not if writing to it was what failed. Otherwise
        the marks of the job that killed it could be missing, and another worker would die of it.
        """
        assert self._socket is not None
        with suppress(OSError):  # there is no more, or it is closed already
            while data := self._socket.recv(_READ_BYTES, socket.MSG_DONTWAIT):
                self.data_received(data)

    def send(self, header: Header, body: bytes = b"") -> None:
        """Send a frame; it is lost if the worker has ended."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(pack(header, body))

    async def ask(self, header: Header) -> Header:
        """Send a command and await the reply.

        Raises:
            ServiceError: the worker refused the command, or ended.
        """
        if self.ended.is_set():
            raise NotReadyError("the worker stopped meanwhile; try again")
        question_id = next(self._ids)
        question = self._questions[question_id] = asyncio.get_running_loop().create_future()
        self.send(header | {"id": question_id})
        try:
            reply: Header = await question
        finally:
            self._questions.pop(question_id, None)
        if reply["kind"] == "refused":
            raise error_from(reply["error"])
        return reply

    def kill(self, reason: str) -> None:
        """End the process at once, unless it has ended."""
        if self.ended.is_set():
            return
        self.was_killed_for = reason
        if self._process is not None and self._process.pid is not None:
            # By its pid: `Process.kill` does nothing once the fork server is gone.
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def finish(self) -> int | None:
        """Wait for the process to end, and kill it if that takes too long.

        Returns:
            Its exit status, negative for a signal; None if it was never started.
        """
        if self._starting is not None:
            await until_started(self._starting)
        if self._transport is not None:
            self._transport.close()
        if self._process is None or self._process.pid is None:
            return None
        return await asyncio.to_thread(_await_end, self._process)


def _run_worker(end: socket.socket, settings: Settings, factory: PredictorFactory, share: Share) -> None:
    # Imported in the worker only: it imports torch, which the process that serves HTTP does not need.
    from service.workers.process import run_worker

    run_worker(end, settings, factory, share)


def _await_end(process: BaseProcess) -> int | None:
    process.join(_LEAVE_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join(_LEAVE_SECONDS)
    return process.exitcode
