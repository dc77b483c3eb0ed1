"""`WorkerPool`: runs models in worker processes, normally one per device. It combines the supervisors of the devices,
the dispatcher of the jobs and the set of models, and knows how many devices there are.
"""

from __future__ import annotations

import asyncio
import logging
import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from service.cores import Share, available_cores, divide_cores, numa_nodes
from service.errors import NotReadyError, ServiceError
from service.metrics import Metrics
from service.settings import Settings
from service.structures import Answer, Job, ModelInfo
from service.workers.channel import Header, error_from, model_info_from
from service.workers.detector import PredictorFactory
from service.workers.dispatch import Dispatcher
from service.workers.handle import WorkerHandle
from service.workers.served_models import ServedModels
from service.workers.supervision import DeviceSupervisor

logger = logging.getLogger(__name__)

# Most characters of a worker's refusal that go into answers and log lines.
_MAX_DETAIL = 500


class WorkerPool:
    """A `Detector`; see the module.

    Args:
        factory: loads the models, in each worker.
        preload: modules that the fork server imports, so that the workers need not.
    """

    def __init__(
        self, settings: Settings, factory: PredictorFactory, metrics: Metrics, *, preload: Sequence[str]
    ) -> None:
        self._settings = settings.without_keys()
        self._factory = factory
        self._metrics = metrics
        self._preload = list(preload)
        self._max_jobs = settings.max_queue_size + settings.max_batch_size
        self._dispatcher = Dispatcher(self._ready_workers, max_jobs=self._max_jobs)
        self._models = ServedModels(self._ready_workers, on_change=self._dispatcher.dispatch)
        self._devices: list[DeviceSupervisor] = []
        self._shares = _cpu_shares(settings)
        self._tasks: set[asyncio.Task[None]] = set()
        self._started: asyncio.Future[Sequence[ModelInfo]] | None = None

    async def start(self) -> Sequence[ModelInfo]:
        """Start the workers; the first reports how many devices there are. Returns when at least one is ready and every
        other one either is, too, or has failed once. Those that failed are retried in the background.

        Raises:
            ServiceError: all devices are down.
        """
        multiprocessing.get_context("forkserver").set_forkserver_preload(self._preload)
        self._started = asyncio.get_running_loop().create_future()
        self._add_device(self._settings.device)
        try:
            return await self._started
        except ServiceError:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End the workers, whatever they are doing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._dispatcher.fail_all(NotReadyError("the service stopped before this request was done"))

    async def run(self, job: Job) -> Answer:
        """Have a worker do a job, or several in turn if they die."""
        if (unavailable := self._unavailable()) is not None:
            raise unavailable
        return await self._dispatcher.run(job)

    async def load(self, reference: str) -> ModelInfo:
        """See `ServedModels.load`."""
        return await self._models.load(reference)

    async def unload(self, model_key: str) -> None:
        """See `ServedModels.unload`."""
        await self._models.unload(model_key)

    def waiting_pixels(self, model_key: str) -> Sequence[int]:
        """See `Dispatcher.waiting_pixels`."""
        return self._dispatcher.waiting_pixels(model_key)

    def memory(self) -> Mapping[tuple[str, str], float]:
        """Bytes by device and kind, of all workers together; may be a few seconds old."""
        sizes: Counter[tuple[str, str]] = Counter()
        for worker in self._workers():
            for labels, size in worker.memory.items():
                # Two workers on one GPU see the same total.
                sizes[labels] = int(max(sizes[labels], size) if labels[1] == "total" else sizes[labels] + size)
        return sizes

    @property
    def capacity(self) -> int:
        """Jobs of each priority that may be under way, in all workers together."""
        return self._max_jobs * max(1, sum(not device.is_down for device in self._devices))

    @property
    def is_alive(self) -> bool:
        """Whether any worker takes jobs."""
        return bool(self._ready_workers())

    @property
    def failure(self) -> str | None:
        """Why no worker is expected to be ready soon; None while one is ready or starting."""
        if not self._devices or not all(device.is_down for device in self._devices):
            return None
        refusal = next((device.refusal for device in self._devices if device.refusal is not None), None)
        detail = "" if refusal is None else f"; the last reason given: {str(refusal)[:_MAX_DETAIL]}"
        failed = max(device.failed_starts for device in self._devices)
        return f"no worker can be started: {failed} starts in a row failed, and another try will follow{detail}"

    @property
    def pids(self) -> Sequence[int]:
        """Process ids of the running workers."""
        return [worker.pid for worker in self._workers() if worker.pid is not None]

    @property
    def _start_has_failed(self) -> bool:
        return self._started is not None and self._started.done() and self._started.exception() is not None

    def _workers(self) -> Sequence[WorkerHandle]:
        return [device.worker for device in self._devices if device.worker is not None]

    def _ready_workers(self) -> Sequence[WorkerHandle]:
        return [worker for worker in self._workers() if worker.is_ready]

    def _unavailable(self) -> NotReadyError | None:
        """The error for callers while all devices are down; None while any is up."""
        if (failure := self.failure) is None:
            return None
        seconds = min(device.next_start_at for device in self._devices) - time.monotonic()
        return NotReadyError(failure, retry_after_seconds=max(1, math.ceil(seconds)))

    def _add_device(self, device: str) -> None:
        supervisor = DeviceSupervisor(
            device,
            start=self._start_worker,
            receive=self._receive,
            on_change=self._devices_changed,
            dispatcher=self._dispatcher,
            metrics=self._metrics,
            probe_timeout_seconds=self._settings.probe_timeout_seconds,
        )
        self._devices.append(supervisor)
        self._in_background(supervisor.run())

    async def _start_worker(self, worker: WorkerHandle, device: str) -> None:
        index = next(place for place, one in enumerate(self._devices) if one.worker is worker)
        share = self._shares[index % len(self._shares)]
        # To a worker the setting says how many share its cores.
        update: dict[str, object] = {"device": device, "workers": share.sharers}
        if "decode_threads" not in self._settings.model_fields_set:
            cores = available_cores() if share.cores is None else len(share.cores)
            update["decode_threads"] = min(self._settings.decode_threads, max(1, cores // share.sharers))
        if self._models.infos:
            update["models"] = tuple(self._models.infos)
        await worker.start(self._settings.model_copy(update=update), self._factory, share)

    def _receive(self, worker: WorkerHandle, header: Header, body: Sequence[bytes]) -> None:
        device = next((one for one in self._devices if one.worker is worker), None)
        if device is None:
            return
        for observation in header.get("observations", ()):
            self._metrics.observe(*observation)
        if header["kind"] == "hello":
            self._add_other_devices(header["gpus"])
        elif header["kind"] == "ready":
            self._worker_ready(worker, [model_info_from(fields) for fields in header["models"]])
        elif header["kind"] == "failed":
            self._worker_refused(device, error_from(header["error"]))
        else:
            worker.has_been_of_use |= header["kind"] in ("answer", "error")
            self._dispatcher.receive(worker, header, body)

    def _add_other_devices(self, gpus: int) -> None:
        """The first worker has reported how many GPUs it sees. If the settings name one, all workers share it."""
        if len(self._devices) > 1:
            return
        is_shared = ":" in self._settings.device or gpus == 0
        if not is_shared:
            self._devices[0].device = "cuda:0"
        by_default = gpus if not is_shared else 1 if gpus else len(self._shares)
        for index in range(1, self._settings.workers or by_default):
            self._add_device(self._settings.device if is_shared else f"cuda:{index % gpus}")

    def _worker_ready(self, worker: WorkerHandle, infos: Sequence[ModelInfo]) -> None:
        worker.models = {info.key: info for info in infos}
        worker.is_ready = True
        worker.got_ready.set()
        assert self._started is not None
        if not self._started.done():
            self._models.infos = self._models.infos or dict(worker.models)
        self._devices_changed()
        # Models may have come and gone while it started.
        self._in_background(self._models.level(worker))
        self._dispatcher.dispatch()

    def _worker_refused(self, device: DeviceSupervisor, error: ServiceError) -> None:
        assert self._started is not None
        device.refuse(error, is_first_start=not self._started.done())
        if not self._start_has_failed:
            fields = {"device": device.device, "detail": str(error)[:_MAX_DETAIL]}
            logger.error("worker cannot load its models", extra={"fields": fields})

    def _devices_changed(self) -> None:
        """A worker has become ready or has ended, or is about to."""
        if (unavailable := self._unavailable()) is not None:
            self._dispatcher.fail_all(unavailable)
        assert self._started is not None
        if self._started.done():
            return
        if self._ready_workers() and all(device.is_ready or device.failed_starts > 0 for device in self._devices):
            self._started.set_result(list(self._models.infos.values()))
        elif unavailable is not None:
            refusals = [device.refusal for device in self._devices if device.refusal is not None]
            error = f"no worker can be started: {self._devices[0].failed_starts} starts in a row failed"
            self._started.set_exception(refusals[0] if refusals else NotReadyError(error))
            for task in self._tasks:
                task.cancel()

    def _in_background(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _cpu_shares(settings: Settings) -> Sequence[Share]:
    """What each worker gets if they run on the CPU. By default there is one per NUMA node, unless a quota or
    OMP_NUM_THREADS, which Ray sets too, allows fewer threads than there are cores.
    """
    nodes = numa_nodes()
    is_limited = available_cores() < sum(map(len, nodes)) or "OMP_NUM_THREADS" in os.environ
    return divide_cores(settings.workers or (1 if is_limited else len(nodes)), settings.bind_workers)
