"""`ClusterDetector`: the detector replicas of a Ray Serve deployment, as one `Detector` for the HTTP app."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from service.cluster.messages import Reply, Request, State
from service.errors import InvalidRequestError, NotReadyError, OverloadedError
from service.logs import request_id_context
from service.metrics import Metrics
from service.structures import Answer, Job, ModelInfo
from service.workers.channel import error_from

logger = logging.getLogger(__name__)

# The jobs of a replica that dies are lost. They are sent again with exponential backoff, since the cluster needs a
# moment to notice: at most this many attempts, within 13 seconds or until the deadline.
_MAX_ATTEMPTS = 9
_FIRST_PAUSE_SECONDS = 0.05
_STATUS_SECONDS = 2.0
_REASON_LENGTH = 300
# How long a replica's reported state stays valid.
_STATE_SECONDS = 15.0


class ClusterDetector:
    """See the module.

    Args:
        handle: to the deployment of `DetectorReplica`.
        deployment: its name in this application.
        metrics: receives the replicas' observations.
    """

    def __init__(self, handle: DeploymentHandle[Any], deployment: str, metrics: Metrics) -> None:
        self._handle = handle
        self._deployment = deployment
        self._metrics = metrics
        self._states: dict[str, tuple[float, State]] = {}
        self._running = 0
        self._capacity_each = 1
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> Sequence[ModelInfo]:
        """Wait for the first replica, which has loaded the models."""
        state: State = await self._handle.state.remote()
        self._running = 1
        self._keep(state)
        self._watching = asyncio.create_task(self._watch())
        return state.models

    async def stop(self) -> None:
        """Stop watching. The replicas keep running: they belong to the cluster."""
        if self._watching is not None:
            self._watching.cancel()

    async def run(self, job: Job) -> Answer:
        """Run a job on some replica, or on another one if that dies. Detection is idempotent, so it may run twice.

        Raises:
            ServiceError: the replica's own error, OverloadedError if all are busy, NotReadyError if none is left.
        """
        for attempt in range(_MAX_ATTEMPTS):
            response = self._handle.run.remote(Request.of(job, request_id_context.get() or "-"))
            try:
                reply: Reply = await response
            except asyncio.CancelledError:
                response.cancel()  # type: ignore[no-untyped-call]  # Ray left it without annotations
                raise
            except BackPressureError as error:
                raise OverloadedError(
                    f"the cluster's queue is full: {error.message}", retry_after_seconds=error.retry_after_s or 1.0
                ) from None
            except RequestCancelledError:
                raise asyncio.CancelledError from None
            except (RayActorError, DeploymentUnavailableError, RayTaskError) as error:
                fields = {"attempt": attempt + 1, "reason": repr(error)[:_REASON_LENGTH]}
                logger.warning("replica lost; its job is sent again", extra={"fields": fields})
                pause = _FIRST_PAUSE_SECONDS * 2**attempt
                if time.monotonic() + pause >= job.deadline:
                    break
                await asyncio.sleep(pause)
            else:
                return self._settle(job, reply)
        raise NotReadyError("the cluster has no replica for this image")

    async def load(self, reference: str) -> ModelInfo:
        """Not supported: a handle reaches one replica, not all of them."""
        raise InvalidRequestError("the models of a cluster are changed by deploying its application again")

    async def unload(self, model_key: str) -> None:
        """See `load`."""
        raise InvalidRequestError("the models of a cluster are changed by deploying its application again")

    def waiting_pixels(self, model_key: str) -> Sequence[int]:
        """As reported with the replicas' last replies."""
        return [pixels for state in self._recent() for pixels in state.waiting_pixels.get(model_key, ())]

    def memory(self) -> Mapping[tuple[str, str], float]:
        """Total over all replicas, as reported with their last replies."""
        sizes: Counter[tuple[str, str]] = Counter()
        for state in self._recent():
            sizes.update(state.memory)
        return sizes

    @property
    def capacity(self) -> int:
        """Jobs of each priority that may be in flight, in all replicas together."""
        return self._capacity_each * max(1, self._running)

    @property
    def is_alive(self) -> bool:
        """Whether a replica runs."""
        return self._running > 0

    @property
    def failure(self) -> str | None:
        """Always None: the cluster keeps trying."""
        return None

    def _settle(self, job: Job, reply: Reply) -> Answer:
        self._keep(reply.state)
        for observation in reply.observations:
            self._metrics.observe(*observation)
        job.progress.enter("respond")
        job.progress.stage_seconds |= reply.stage_seconds
        if isinstance(reply.outcome, Answer):
            return reply.outcome
        raise error_from(reply.outcome)

    def _keep(self, state: State) -> None:
        self._states[state.replica] = (time.monotonic(), state)
        self._capacity_each = state.capacity

    def _recent(self) -> list[State]:
        since = time.monotonic() - _STATE_SECONDS
        self._states = {replica: (at, state) for replica, (at, state) in self._states.items() if at >= since}
        return [state for _, state in self._states.values()]

    async def _watch(self) -> None:
        """Keep counting the running replicas for as long as the app runs."""
        application = serve.get_replica_context().app_name
        while True:
            await asyncio.sleep(_STATUS_SECONDS)
            try:
                status = await asyncio.to_thread(serve.status)
                replicas = status.applications[application].deployments[self._deployment].replica_states
            except Exception as error:  # the controller may be restarting; keep the last known state
                fields = {"reason": repr(error)[:_REASON_LENGTH]}
                logger.warning("the cluster does not say how it does", extra={"fields": fields})
            else:
                self._running = sum(number for kind, number in replicas.items() if kind.value == "RUNNING")
