"""The metrics, for Prometheus to scrape."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from service.api.state import State

router = APIRouter(tags=["metrics"])


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}},
)
async def metrics(request: Request, state: State) -> Response:
    """All metrics of this process, in Prometheus' text format, or in OpenMetrics, with trace ids as exemplars, if the
    request accepts that.
    """
    state.metrics.set_device_memory(state.detector.memory())
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(state.metrics.registry), media_type=media_type)
