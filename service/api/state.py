"""What the routes of one app share: settings, metrics, the detector, the loaded models and the phase of the service.
Routes get it as the dependency `State`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from fastapi import Depends, Request

from service.api.keys import Keys
from service.api.label_studio_images import LabelStudioImages
from service.api.quotas import Quotas
from service.batching.held_bytes import HeldBytes
from service.errors import ModelNeededError, ModelNotFoundError, NotReadyError, ServiceError
from service.metrics import Metrics
from service.settings import Settings
from service.structures import ModelInfo
from service.tracing import Tracer
from service.workers.detector import Admission, Detector

logger = logging.getLogger(__name__)


class Phase(StrEnum):
    """The phase of the service. While draining it still answers, but asks for no more requests."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Lifecycle:
    """The phase, and the requests that are under way.

    Attributes:
        failure: the error that ended the loading of models; the server must stop.
        gave_up: whether the time for finishing requests is up.
        has_models: whether the models have been loaded; they may never be if the service is told to stop first.
        url: where it listens; None until it does.
    """

    def __init__(self) -> None:
        self.phase = Phase.LOADING
        self.failure: BaseException | None = None
        self.gave_up = False
        self.has_models = False
        self.url: str | None = None
        self._tasks: set[asyncio.Task[object]] = set()

    def require_serving(self) -> None:
        """Raise NotReadyError while the models are loading."""
        if not self.has_models:
            raise NotReadyError("the models are still loading")

    @property
    def requests_under_way(self) -> int:
        """Number of requests that have arrived and are not answered yet."""
        return len(self._tasks)

    def enter(self, task: asyncio.Task[object]) -> None:
        """A request begins in this task."""
        self._tasks.add(task)

    def leave(self, task: asyncio.Task[object]) -> None:
        """The request of this task has ended."""
        self._tasks.remove(task)

    def give_up(self) -> None:
        """Cancel the requests that are still under way; each then answers that the service has stopped."""
        self.gave_up = True
        for task in self._tasks:
            task.cancel()


class LoadedModels:
    """The models that take requests, in the order in which they were loaded.

    Args:
        default_model: name or name@version; None for the first that has masks, else the first.
    """

    def __init__(self, default_model: str | None = None) -> None:
        self._default_model = default_model
        self._infos: list[ModelInfo] = []
        self._users: Counter[str] = Counter()
        self._released = asyncio.Event()

    def __iter__(self) -> Iterator[ModelInfo]:
        return iter(self._infos)

    def add(self, info: ModelInfo) -> None:
        """Take requests for this model from now on."""
        self._infos.append(info)

    def replace(self, info: ModelInfo) -> Sequence[ModelInfo]:
        """Take requests for this model from now on, and no more for the models of the same name, which it replaces.

        Returns:
            The models that it replaces.

        Raises:
            ModelNeededError: requests that name no model would find none.
        """
        replaced = [one for one in self._infos if one.name == info.name]
        at = self._infos.index(replaced[0]) if replaced else len(self._infos)
        others = [one for one in self._infos if one.name != info.name]
        before, self._infos = self._infos, [*others[:at], info, *others[at:]]
        try:
            self.find(None)
        except ModelNotFoundError:
            self._infos = before
            raise ModelNeededError(
                f"{self._default_model} is what requests that name no model go to; it must stay"
            ) from None
        return replaced

    def remove(self, name: str) -> Sequence[ModelInfo]:
        """Take no more requests for the models of a name, or name@version.

        Returns:
            Those models.

        Raises:
            ModelNotFoundError: there is no such model.
            ModelNeededError: requests that name no model would find none.
        """
        self.find(name)
        removed = [one for one in self._infos if name in (one.name, one.key)]
        if (default := self.find(None)) in removed:
            raise ModelNeededError(f"{default.key} is what requests that name no model go to; it must stay")
        self._infos = [one for one in self._infos if one not in removed]
        return removed

    @contextmanager
    def use(self, info: ModelInfo) -> Iterator[None]:
        """Enter for as long as a request needs a model."""
        self._users[info.key] += 1
        try:
            yield
        finally:
            self._users[info.key] -= 1
            self._released.set()

    async def wait_until_unused(self, info: ModelInfo) -> None:
        """Wait until the last request that uses it has been answered."""
        while self._users[info.key] > 0:
            self._released.clear()
            await self._released.wait()
        del self._users[info.key]

    def find(self, name: str | None) -> ModelInfo:
        """The model of a name (its highest version) or name@version; None for the default.

        Raises:
            ModelNotFoundError: no model of that name is loaded; lists those that are.
        """
        name = self._default_name() if name is None else name
        found = [one for one in self._infos if name in (one.name, one.key)]
        if not found:
            known = ", ".join(sorted(one.key for one in self._infos)) or "none"
            raise ModelNotFoundError(f"no model {name[:200]!r} is loaded; loaded: {known}")
        return max(found, key=lambda one: one.version)

    def _default_name(self) -> str:
        if self._default_model is not None:
            return self._default_model
        if not self._infos:
            raise ModelNotFoundError("no model is loaded")
        return next((one for one in self._infos if one.has_masks), self._infos[0]).key


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ApiState:
    """See the module."""

    settings: Settings
    keys: Keys
    metrics: Metrics
    detector: Detector
    admission: Admission
    models: LoadedModels
    lifecycle: Lifecycle
    held_bytes: HeldBytes
    changing_models: asyncio.Lock
    quotas: Quotas
    tracer: Tracer | None = None
    label_studio_images: LabelStudioImages | None = None

    @property
    def is_ready(self) -> bool:
        """Whether requests are wanted: models are loaded, a worker can run them, and the service is not stopping."""
        return self.lifecycle.phase is Phase.READY and self.detector.is_alive

    def add_model(self, info: ModelInfo) -> None:
        """Take requests for this model from now on, and count them."""
        self.models.add(info)
        self._show(info)

    def _show(self, info: ModelInfo) -> None:
        self.metrics.add_model(
            info,
            queue_depth=lambda: len(self.detector.waiting_pixels(info.key)),
            queue_pixels=lambda: sum(self.detector.waiting_pixels(info.key)),
        )

    async def load_model(self, reference: str) -> ModelInfo:
        """Load a model beside those that serve, and let it replace the one of the same name. Returns when the last
        request for the old one has been answered and it is unloaded.

        Args:
            reference: name, for its default or highest version in the store, or name@version.

        Raises:
            ServiceError: the model cannot be loaded, or must not replace the old one, which then goes on serving.
        """
        async with self.changing_models:
            info = await self.detector.load(reference)
            if any(one.key == info.key for one in self.models):
                return info
            try:
                replaced = self.models.replace(info)
            except ServiceError:
                await self.detector.unload(info.key)
                raise
            self._show(info)
            await self._retire(replaced)
            return info

    async def unload_model(self, name: str) -> None:
        """Unload the models of a name, or name@version, once the last request for them has been answered.

        Raises:
            ServiceError: there is no such model, or it must stay.
        """
        async with self.changing_models:
            await self._retire(self.models.remove(name))

    async def _retire(self, infos: Sequence[ModelInfo]) -> None:
        for info in infos:
            await self.models.wait_until_unused(info)
            await self.detector.unload(info.key)
            self.metrics.remove_model(info)
            logger.info("model unloaded", extra={"fields": {"model": info.key}})


# A coroutine, like all our dependencies: FastAPI calls plain functions in a thread, which costs more than their work.
async def _state(request: Request) -> ApiState:
    state: ApiState = request.app.state.api
    return state


State = Annotated[ApiState, Depends(_state)]
