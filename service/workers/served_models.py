"""`ServedModels`: the one set of models that all workers have. Whenever it changes, or a worker becomes ready, workers
load the models they lack and unload those that are no longer served; a worker that fails to do so is replaced.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from service.errors import NotReadyError, ServiceError
from service.structures import ModelInfo
from service.workers.channel import model_info_from
from service.workers.handle import WorkerHandle
from service.workers.supervision import START_SECONDS

logger = logging.getLogger(__name__)


class ServedModels:
    """See the module.

    Args:
        ready_workers: returns the workers that take jobs now.
        on_change: called when a worker has one more model.

    Attributes:
        infos: the models by key.
    """

    def __init__(self, ready_workers: Callable[[], Sequence[WorkerHandle]], *, on_change: Callable[[], None]) -> None:
        self.infos: dict[str, ModelInfo] = {}
        self._ready_workers = ready_workers
        self._on_change = on_change
        self._changing = asyncio.Lock()

    async def load(self, reference: str) -> ModelInfo:
        """Load a further model in one worker first, then in the others; if any of them fails, it is served by none.

        Raises:
            ServiceError: it cannot be loaded, or no worker is alive.
        """
        async with self._changing:
            if reference in self.infos:
                return self.infos[reference]
            workers = self._ready_workers()
            if not workers:
                raise NotReadyError("no worker is alive to load a model")
            try:
                info = await self._load_into(workers[0], reference)
                for worker in workers[1:]:
                    if worker.is_ready and info.key not in worker.models:
                        await self._load_into(worker, info.key)
                self.infos[info.key] = info
            finally:
                await self._level_all()
            return info

    async def unload(self, model_key: str) -> None:
        """Unload a model in all workers."""
        async with self._changing:
            self.infos.pop(model_key, None)
            await self._level_all()

    async def level(self, worker: WorkerHandle) -> None:
        """Bring a worker that has become ready up to the models that are served by now."""
        async with self._changing:
            await self._level(worker)

    async def _load_into(self, worker: WorkerHandle, reference: str) -> ModelInfo:
        try:
            async with asyncio.timeout(START_SECONDS):
                reply = await worker.ask({"kind": "load", "model": reference})
        except TimeoutError:
            # Otherwise it might go on forever, and keep what it has loaded so far.
            worker.kill("start_failed")
            raise NotReadyError(f"the model {reference} was not loaded within {START_SECONDS:g} s") from None
        info = model_info_from(reply["model"])
        worker.models[info.key] = info
        self._on_change()
        return info

    async def _level_all(self) -> None:
        for worker in self._ready_workers():
            await self._level(worker)

    async def _level(self, worker: WorkerHandle) -> None:
        if not worker.is_ready:
            return
        try:
            for key in self.infos.keys() - worker.models.keys():
                await self._load_into(worker, key)
            for key in worker.models.keys() - self.infos.keys():
                del worker.models[key]
                await worker.ask({"kind": "unload", "model": key})
        except ServiceError as error:
            logger.error("worker cannot have the models that are served", extra={"fields": {"reason": str(error)}})
            worker.kill("start_failed")
