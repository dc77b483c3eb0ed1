"""A detector replica: our worker pool in a Ray actor. The pool itself handles pictures that kill a worker process, so
the cluster sees a replica fail only if its machine does.
"""

from __future__ import annotations

import logging
import uuid
from collections import deque
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from service.cluster.messages import Reply, Request, State
from service.errors import NotReadyError, ServiceError
from service.logs import configure_logging, request_id_context
from service.metrics import Metrics, Observation, Observed
from service.settings import Settings
from service.structures import ModelInfo
from service.workers.channel import error_to
from service.workers.detector import PredictorFactory
from service.workers.pool import WorkerPool
from service.workers.stored import PRELOAD, stored_predictors

logger = logging.getLogger(__name__)


class DetectorReplica:
    """See the module. Constructed in the actor; ready once its models are loaded.

    Args:
        settings: `device`, `models` and everything else about running models. The cluster scales out, not `workers`,
            but one replica may still use several devices.
        factory: loads the models in each worker process; None for the models in the store.
    """

    async def __init__(self, settings: Settings, factory: PredictorFactory | None = None) -> None:  # type: ignore[misc]  # Ray awaits it
        configure_logging(log_format=settings.log_format, log_level=settings.log_level)
        self._id = uuid.uuid4().hex[:12]
        self._metrics = _Relay()
        # A replica seldom starts a second worker, so what another factory may not need is not imported ahead.
        preload = PRELOAD if factory is None else ()
        self._pool = WorkerPool(settings, factory or stored_predictors, self._metrics, preload=preload)
        self._models: Sequence[ModelInfo] = await self._pool.start()

    async def run(self, request: Request) -> Reply:
        """Run a job. A ServiceError is returned as a reply, so an exception always means that the replica is gone."""
        request_id_context.set(request.request_id)
        job = request.unpacked()
        try:
            outcome = await self._pool.run(job)
        except ServiceError as error:
            return Reply(error_to(error), job.progress.stage_seconds, self._metrics.take(), self._state())
        return Reply(outcome, job.progress.stage_seconds, self._metrics.take(), self._state())

    async def state(self) -> State:
        """Its identity and current state."""
        return self._state()

    async def check_health(self) -> None:
        """Ray's health check: the cluster replaces a replica that raises."""
        if self._pool.failure is not None:
            raise NotReadyError(self._pool.failure)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Input for the autoscaler, see `scaling.py`."""
        waiting = sum(sum(self._pool.waiting_pixels(info.key)) for info in self._models)
        return {"queue_pixels": float(waiting)}

    async def stop(self) -> None:
        """End the worker processes."""
        await self._pool.stop()

    async def __del__(self) -> None:
        """Awaited by the cluster once the replica has drained."""
        await self.stop()

    def _state(self) -> State:
        waiting = {info.key: tuple(self._pool.waiting_pixels(info.key)) for info in self._models}
        return State(self._id, self._pool.capacity, self._models, waiting, dict(self._pool.memory()))


class _Relay(Metrics):
    """Collects observations for the ingress, which exposes them at /metrics."""

    def __init__(self) -> None:
        super().__init__(CollectorRegistry())
        self._observations: deque[Observation] = deque(maxlen=100_000)

    def observe(self, name: Observed, labels: Sequence[str], value: float, trace_id: str | None = None) -> None:
        self._observations.append((name, tuple(labels), value, trace_id))

    def take(self) -> Sequence[Observation]:
        """The observations since the last call."""
        return [self._observations.popleft() for _ in range(len(self._observations))]
