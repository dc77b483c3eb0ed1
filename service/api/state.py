"""What the routes of one app share: settings, metrics, the detector, the loaded models and where the service is in its
life. Made by `app.py`; routes get it as the dependency `State`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from fastapi import Depends, Request

from service.batching.held_bytes import HeldBytes
from service.errors import ModelNotFoundError, NotReadyError
from service.metrics import Metrics
from service.settings import Settings
from service.structures import ModelInfo
from service.workers.detector import Admission, Detector


class Phase(StrEnum):
    """Where the service is in its life. While draining it still answers, but wants no more requests."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Lifecycle:
    """The phase, and the requests that are under way.

    Attributes:
        failure: what ended the loading of models; the server is to stop.
        gave_up: whether the time for finishing requests is up.
    """

    def __init__(self) -> None:
        self.phase = Phase.LOADING
        self.failure: BaseException | None = None
        self.gave_up = False
        self._tasks: set[asyncio.Task[object]] = set()

    def require_serving(self) -> None:
        """Raise NotReadyError while the models are loading."""
        if self.phase is Phase.LOADING:
            raise NotReadyError("the models are still loading")

    def enter(self, task: asyncio.Task[object]) -> None:
        """A request begins in this task."""
        self._tasks.add(task)

    def leave(self, task: asyncio.Task[object]) -> None:
        """Its answer was sent."""
        self._tasks.remove(task)

    def give_up(self) -> None:
        """Cancel the requests that are still under way; each then answers that the service has stopped."""
        self.gave_up = True
        for task in self._tasks:
            task.cancel()


class LoadedModels:
    """The models that can be asked, in the order in which they were loaded.

    Args:
        default_model: name or name@version; None for the first that has masks, else the first.
    """

    def __init__(self, default_model: str | None = None) -> None:
        self._default_model = default_model
        self._infos: list[ModelInfo] = []

    def __iter__(self) -> Iterator[ModelInfo]:
        return iter(self._infos)

    def add(self, info: ModelInfo) -> None:
        """Take requests for this model from now on."""
        self._infos.append(info)

    def find(self, name: str | None) -> ModelInfo:
        """The model of a name (its highest version) or name@version; None for the default.

        Raises:
            ModelNotFoundError: none of that name; lists those that are loaded.
        """
        name = self._default_name() if name is None else name
        found = [one for one in self._infos if name in (one.name, one.key)]
        if not found:
            known = ", ".join(sorted(one.key for one in self._infos)) or "none"
            raise ModelNotFoundError(f"no model {name!r} is loaded; loaded: {known}")
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
    metrics: Metrics
    detector: Detector
    admission: Admission
    models: LoadedModels
    lifecycle: Lifecycle
    held_bytes: HeldBytes

    def add_model(self, info: ModelInfo) -> None:
        """Take requests for this model from now on, and count them."""
        self.models.add(info)
        self.metrics.add_model(
            info,
            queue_depth=lambda: len(self.detector.waiting_pixels(info.key)),
            queue_pixels=lambda: sum(self.detector.waiting_pixels(info.key)),
        )


def _state(request: Request) -> ApiState:
    state: ApiState = request.app.state.api
    return state


State = Annotated[ApiState, Depends(_state)]
