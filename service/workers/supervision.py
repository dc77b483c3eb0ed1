"""`DeviceSupervisor`: keeps one worker running on one device, replacing its process as often as necessary. It starts
the process, pings it every second, kills it if it hangs, and retries for as long as the server lives.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from service.errors import ServiceError
from service.metrics import Metrics
from service.workers.channel import Header
from service.workers.dispatch import Dispatcher
from service.workers.handle import WorkerHandle

logger = logging.getLogger(__name__)

# After so many failed starts in a row, the device counts as down until one succeeds.
MAX_FAILED_STARTS = 5
_FIRST_BACKOFF_SECONDS = 0.5
_MAX_BACKOFF_SECONDS = 30.0
# A worker that has run well for so long after it was ready, or has answered a job, does not count as a failed start.
_TRIAL_SECONDS = 10.0
_PING_SECONDS = 1.0
# A process that is alive answers pings at once, whatever its device and its other threads are doing.
_MAX_SILENT_SECONDS = 15.0
# How long all models together may take to load, compile and warm up.
START_SECONDS = 900.0


class DeviceSupervisor:
    """See the module.

    Args:
        device: like the setting of this name.
        start: starts the process of a worker on a device.
        receive: takes the frames that a worker sends unasked.
        on_change: called when a worker has ended, or cannot load its models.
        probe_timeout_seconds: how long a worker may make no progress.

    Attributes:
        worker: the current one; None between two.
        failed_starts: how many starts in a row have failed.
        refusal: why the last worker that could not load its models failed to.
        next_start_at: when the next worker is started, in seconds of `time.monotonic`.
    """

    def __init__(
        self,
        device: str,
        *,
        start: Callable[[WorkerHandle, str], Coroutine[Any, Any, None]],
        receive: Callable[[WorkerHandle, Header, Sequence[bytes]], None],
        on_change: Callable[[], None],
        dispatcher: Dispatcher,
        metrics: Metrics,
        probe_timeout_seconds: float,
    ) -> None:
        self.device = device
        self.worker: WorkerHandle | None = None
        self.failed_starts = 0
        self.refusal: ServiceError | None = None
        self.next_start_at = 0.0
        self._start = start
        self._receive = receive
        self._on_change = on_change
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._limit_seconds = probe_timeout_seconds

    @property
    def is_ready(self) -> bool:
        """Whether the worker takes jobs."""
        return self.worker is not None and self.worker.is_ready

    @property
    def is_down(self) -> bool:
        """Whether the device is not expected to work soon."""
        return self.failed_starts >= MAX_FAILED_STARTS and not self.is_ready

    async def run(self) -> None:
        """Supervise until cancelled."""
        while True:
            pause_seconds = min(_FIRST_BACKOFF_SECONDS * (2 ** min(self.failed_starts, 20) - 1), _MAX_BACKOFF_SECONDS)
            self.next_start_at = time.monotonic() + pause_seconds
            await asyncio.sleep(pause_seconds)
            if await self._run_worker():
                self.failed_starts, self.refusal = 0, None
            else:
                self.failed_starts += 1
            if self.is_down:
                fields = {"device": self.device, "failed_starts": self.failed_starts}
                logger.error("device is down and will be tried again", extra={"fields": fields})
            self._on_change()

    def refuse(self, error: ServiceError, *, is_first_start: bool) -> None:
        """End the worker, since it reports that it cannot load its models. At the first start a quick retry would fail
        the same way, so the device counts as down; later, the store may be about to change.
        """
        self.refusal = error
        if is_first_start:
            self.failed_starts = MAX_FAILED_STARTS
        if self.worker is not None:
            self.worker.kill("start_failed")
        self._on_change()

    async def _run_worker(self) -> bool:
        """Start a worker and supervise it to its end.

        Returns:
            False if this counts as a failed start: the worker was of no use, and no job may have killed it.
        """
        handle = self.worker = WorkerHandle(self._receive)
        watching: asyncio.Task[None] | None = None
        try:
            await self._start(handle, self.device)
            watching = asyncio.create_task(self._watch(handle))
            await handle.ended.wait()
        except (OSError, EOFError) as error:  # no descriptors, no memory for a process, or the fork server ended
            detail = {"device": self.device, "detail": str(error)}
            logger.error("worker cannot be started", extra={"fields": detail})
        except Exception as error:
            logger.error("worker cannot be started", exc_info=error)
        finally:
            if watching is not None:
                watching.cancel()
            self.worker = None
            # A worker that was killed because of its models was not killed by a job.
            of_a_job = handle.was_killed_for != "start_failed" and self._dispatcher.is_at_risk(handle)
            requests = self._dispatcher.requests_at_risk(handle)
            self._dispatcher.recover(handle, of_a_job=of_a_job)
            status = await handle.finish()
        reason = handle.was_killed_for or ("crashed" if status is None or status >= 0 else "killed")
        reason = reason if handle.got_ready.is_set() else "start_failed"
        self._metrics.worker_restarts.labels(reason).inc()
        fields: dict[str, object] = {"device": self.device, "reason": reason, "exit_status": status}
        if requests:
            fields["requests_at_risk"] = ",".join(requests)
        logger.error("worker ended", extra={"fields": fields})
        return handle.has_been_of_use or of_a_job

    async def _watch(self, handle: WorkerHandle) -> None:
        """Ping a worker regularly, and kill it if it does not answer or makes no progress."""
        try:
            async with asyncio.timeout(START_SECONDS):
                await handle.got_ready.wait()
        except TimeoutError:
            handle.kill("start_failed")
            return
        ready_at = time.monotonic()
        while not handle.ended.is_set():
            try:
                pong = await self._ping(handle)
            except ServiceError:
                return  # it has ended
            if pong is None or (detail := self._complaint(handle, pong)):
                detail = "it does not answer" if pong is None else detail
                logger.error("worker hangs", extra={"fields": {"device": self.device, "detail": detail}})
                handle.kill("hung")
                return
            handle.has_been_of_use |= time.monotonic() - ready_at > _TRIAL_SECONDS
            await asyncio.sleep(self._ping_seconds)

    @property
    def _ping_seconds(self) -> float:
        return min(_PING_SECONDS, self._limit_seconds / 4)

    async def _ping(self, handle: WorkerHandle) -> Header | None:
        """Ping a worker; None if it does not answer in time.

        Time is counted in short waits, so that a pause of this process itself is not taken for silence of the worker.
        """
        asking = asyncio.create_task(handle.ask({"kind": "ping"}))
        silent_seconds = 0.0
        try:
            while not (await asyncio.wait([asking], timeout=self._ping_seconds))[0]:
                silent_seconds += self._ping_seconds
                # Loading a model may hold the GIL for longer.
                limit = _MAX_SILENT_SECONDS if handle.pending_commands == 1 else self._limit_seconds
                if silent_seconds >= min(limit, self._limit_seconds):
                    return None
            return asking.result()
        finally:
            asking.cancel()

    def _complaint(self, handle: WorkerHandle, pong: Header) -> str | None:
        """Record what a pong reports; returns why the worker must be killed, or None."""
        handle.memory = {(device, kind): size for device, kind, size in pong["memory"]}
        for observation in pong["observations"]:
            self._metrics.observe(*observation)
        if pong["failure"] is not None:
            return str(pong["failure"])
        # A suspect occupies a whole worker, and other jobs wait for it.
        limit = self._limit_seconds / (2 if self._dispatcher.tries_suspect(handle) else 1)
        return f"no progress for more than {limit:g} s" if pong["busy_seconds"] > limit else None
