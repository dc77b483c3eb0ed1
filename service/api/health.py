"""Probes for an orchestrator: whether the process is alive, and whether it wants requests."""

from __future__ import annotations

from fastapi import APIRouter, Response

from service.api.openapi import describe_answer, describe_errors
from service.api.schemas import Health, json_response
from service.api.state import Phase, State
from service.errors import NotReadyError

router = APIRouter(tags=["health"])


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", responses=describe_answer(Health) | describe_errors(503))
async def live(state: State) -> Response:
    """Whether the process answers and its workers can do their work, now or soon. 503 while the last starts of all
    workers have failed; they are retried, so it may become 200 again without a restart.
    """
    if (failure := state.detector.failure) is not None:
        raise NotReadyError(failure)
    return json_response({"status": "ok"})


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", responses=describe_answer(Health) | describe_errors(503))
async def ready(state: State) -> Response:
    """Whether requests are wanted: all models are loaded and warmed up, a worker is available to run them, and the
    service is not stopping.
    """
    phase = state.lifecycle.phase
    if phase is not Phase.READY:
        raise NotReadyError(f"the service is {phase}")
    if not state.detector.is_alive:
        raise NotReadyError(state.detector.failure or "no worker is alive; one is being started")
    return json_response({"status": phase})
