"""The worker process: a `LocalDetector` at the end of a socket. It ends when the socket is closed, so that no worker
outlives the process that started it.

It sends `hello` once it has counted the GPUs, then `ready` when its models are loaded or `failed` if they cannot be.
Then it sends an `answer` or an `error` for each `job`; a `mark` before a thread begins work on a job and soon after it
has ended, and `queued` when the job waits for the device; a `pong` for each `ping`; and `loaded`, `unloaded` or
`refused` for each `load` and `unload`. Observations for the metrics travel with answers and pongs.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict

from service.cores import Share
from service.devices import count_gpus
from service.errors import ServiceError
from service.logs import configure_logging, request_id_context
from service.metrics import Observation, Observed
from service.settings import Settings
from service.structures import Answer, Job, Progress
from service.workers.channel import BlockingChannel, Header, error_to, form_from, options_from, source_from
from service.workers.detector import PredictorFactory
from service.workers.local import LocalDetector

logger = logging.getLogger(__name__)

# Sending so much takes longer than handing it over to a thread.
_LONG_ANSWER_BYTES = 1024 * 1024
# For marks that need not be known at once.
_DELAY_SECONDS = 0.01


def run_worker(end: socket.socket, settings: Settings, factory: PredictorFactory, share: Share) -> None:
    """Serve the process at the other end of the socket until that end closes.

    Args:
        share: what it gets of the CPU, if it runs its models there.
    """
    configure_logging(log_format=settings.log_format, log_level=settings.log_level)
    # Workers start no processes, but numba creates a multiprocessing lock on import. With `fork` that lock is unnamed,
    # so the resource tracker has no leak to warn about at exit.
    multiprocessing.set_start_method("fork", force=True)
    asyncio.run(_Worker(end, settings, factory, share).serve())


class _MarkedProgress(Progress):
    """Reports work to the other process before it begins and after it has ended."""

    def __init__(self, stage: str, *, trace_id: str | None, job_id: int, channel: BlockingChannel) -> None:
        super().__init__(stage, trace_id=trace_id)
        self._job_id = job_id
        self._channel = channel

    def enter(self, stage: str) -> None:
        super().enter(stage)
        if stage == "encode":
            # So that waiting for an encoder does not count as inference.
            self._mark("encode", 0)

    def _mark(self, stage: str | None, change: int, *, at_once: bool = False) -> None:
        send = self._channel.send if at_once else self._channel.send_soon
        send({"kind": "mark", "id": self._job_id, "stage": stage, "change": change})

    def queued(self, padded_pixels: int) -> None:
        self._channel.send_soon({"kind": "queued", "id": self._job_id, "pixels": padded_pixels})


class _Worker:
    """One worker; see the module."""

    def __init__(self, end: socket.socket, settings: Settings, factory: PredictorFactory, share: Share) -> None:
        self._channel = BlockingChannel(end, self._later)
        self._share = share
        self._settings = settings
        self._factory = factory
        self._observations: deque[Observation] = deque()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._commands: set[asyncio.Task[None]] = set()
        self._probing: asyncio.Task[None] | None = None
        self._probed_at = 0.0
        self._probe_failure: str | None = None
        self._memory: list[list[object]] = []

    async def serve(self) -> None:
        """Load the models, then serve the other process; never returns."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, name="channel", daemon=True).start()
        gpus = 0 if self._settings.device == "cpu" else await asyncio.to_thread(count_gpus)
        self._channel.send({"kind": "hello", "gpus": gpus})
        if gpus > 0 and self._settings.device in ("auto", "cuda"):
            # Named like the other workers' devices, so that all workers on one GPU report the same label.
            self._settings = self._settings.model_copy(update={"device": "cuda:0"})
        if gpus == 0:
            # Before the models are loaded, so that their memory lies at the same node.
            self._share.bind()
        self._detector = LocalDetector(self._settings, self._factory, self._observe)
        try:
            infos = await self._detector.start()
        except Exception as error:
            if not isinstance(error, ServiceError):
                logger.error("the models cannot be loaded", exc_info=error)
            self._channel.send({"kind": "failed", "error": error_to(error)})
        else:
            self._channel.send({"kind": "ready", "models": [asdict(info) for info in infos]})
        await asyncio.Event().wait()  # `_read` ends the process

    def _later(self, function: Callable[[], None]) -> None:
        """Call a function on the event loop in some milliseconds."""
        self._loop.call_soon_threadsafe(self._loop.call_later, _DELAY_SECONDS, function)

    def _read(self) -> None:
        try:
            for header, body in self._channel.frames():
                self._loop.call_soon_threadsafe(self._obey, header, body)
        except OSError:
            pass  # reset rather than closed: the other process was killed
        finally:
            # Exit at once, whatever the other threads are doing: nothing waits for their results any more.
            os._exit(0)

    def _obey(self, header: Header, body: bytes) -> None:
        if header["kind"] == "job":
            task = asyncio.create_task(self._run(header, body))
            self._tasks[header["id"]] = task
            task.add_done_callback(lambda _: self._tasks.pop(header["id"]))
        elif header["kind"] == "cancel":
            if header["id"] in self._tasks:
                self._tasks[header["id"]].cancel()
        else:
            command = asyncio.create_task(self._answer_command(header))
            self._commands.add(command)
            command.add_done_callback(self._commands.discard)

    async def _run(self, header: Header, body: bytes) -> None:
        request_id_context.set(header["request_id"])
        progress = _MarkedProgress("received", trace_id=header["trace_id"], job_id=header["id"], channel=self._channel)
        job = Job(
            model=header["model"],
            source=source_from(header["source"], body),
            options=options_from(header["options"]),
            form=form_from(header["form"]),
            deadline=header["deadline"],
            progress=progress,
            is_bulk=header["is_bulk"],
            entries=header["entries"],
        )
        try:
            answer = await self._detector.run(job)
        except Exception as error:
            if self._detector.breakdown is not None:
                logger.error("worker gives up", extra={"fields": {"reason": self._detector.breakdown}})
                os._exit(1)  # another worker may succeed with this job
            self._reply("error", {"kind": "error", "id": header["id"], "error": error_to(error)})
        else:
            await self._answer(header["id"], answer, progress)

    async def _answer(self, job_id: int, answer: Answer, progress: Progress) -> None:
        fields = {
            "image_size": answer.image_size,
            "orientation_applied": answer.orientation_applied,
            "detections": answer.detections,
            "batch_size": answer.batch_size,
            "batch_id": answer.batch_id,
            "left_out": answer.left_out,
        }
        stages = {stage: progress.stage_seconds[stage] for stage in ("decode", "queue", "inference", "encode")}
        header = {"kind": "answer", "id": job_id, "answer": fields, "stage_seconds": stages}
        header["observations"] = self._take_observations()
        if answer.num_bytes < _LONG_ANSWER_BYTES:
            self._reply("error", header, answer.encoded)
        else:
            # Sending waits for the other process to read.
            await asyncio.to_thread(self._reply, "error", header, answer.encoded)

    async def _answer_command(self, header: Header) -> None:
        commands = {"ping": self._ping, "load": self._load, "unload": self._unload}
        answer: Awaitable[Header] = commands[header["kind"]](header)
        try:
            reply = await answer
        except Exception as error:
            if not isinstance(error, ServiceError):
                logger.error("a command failed", exc_info=error)
            reply = {"kind": "refused", "error": error_to(error)}
        self._reply("refused", reply | {"id": header["id"]})

    def _reply(self, kind_of_error: str, header: Header, body: bytes = b"") -> None:
        """Send a reply. If no frame can hold it, send an error instead, since a caller is waiting."""
        try:
            self._channel.send(header, body)
        except (TypeError, struct.error) as error:
            self._channel.send({"kind": kind_of_error, "id": header["id"], "error": error_to(error)})

    async def _ping(self, header: Header) -> Header:
        """Reply at once: `busy_seconds` shows a hanging device, whereas silence means that the process hangs."""
        if self._probing is None:
            self._probing = asyncio.create_task(self._probe())
            self._probed_at = time.monotonic()
            await asyncio.sleep(0)
        return {
            "kind": "pong",
            "busy_seconds": max(self._detector.busy_seconds, self._probe_seconds()),
            "failure": self._probe_failure,
            "memory": self._memory,
            "observations": self._take_observations(),
        }

    def _probe_seconds(self) -> float:
        return 0.0 if self._probing is None else time.monotonic() - self._probed_at

    async def _probe(self) -> None:
        def probe() -> list[list[object]]:
            self._detector.probe()
            return [[*labels, size] for labels, size in self._detector.memory().items()]

        try:
            self._memory = await asyncio.to_thread(probe)
        except Exception as error:
            self._probe_failure = f"the device fails its probe: {error}"
        finally:
            self._probing = None

    async def _load(self, header: Header) -> Header:
        return {"kind": "loaded", "model": asdict(await self._detector.load(header["model"]))}

    async def _unload(self, header: Header) -> Header:
        await self._detector.unload(header["model"])
        return {"kind": "unloaded"}

    def _observe(self, name: Observed, labels: Sequence[str], value: float, trace_id: str | None = None) -> None:
        self._observations.append((name, labels, value, trace_id))

    def _take_observations(self) -> list[Observation]:
        # One by one, since the device's thread may be adding more.
        return [self._observations.popleft() for _ in range(len(self._observations))]
