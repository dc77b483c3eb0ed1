"""`create_app(settings)`: the only place that wires the rooms together. The app's lifespan starts everything that has
threads, loads the models while the server already listens, and stops everything in reverse.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry
from starlette.middleware.gzip import GZipMiddleware

from service.api import (
    cvat,
    detect,
    docs,
    health,
    hugging_face,
    label_studio,
    metrics,
    models,
    predict,
    roboflow,
    start,
    v2,
)
from service.api.errors import add_error_handlers
from service.api.keys import Keys
from service.api.label_studio_images import label_studio_images
from service.api.management import management_server
from service.api.middleware import RequestMiddleware
from service.api.openapi import describe_app
from service.api.quotas import Quotas
from service.api.state import ApiState, Lifecycle, LoadedModels, Phase
from service.batching.held_bytes import HeldBytes
from service.errors import ServiceError
from service.metrics import Metrics
from service.settings import Settings
from service.tracing import Tracer
from service.workers.detector import Admission, Detector, PredictorFactory
from service.workers.pool import WorkerPool
from service.workers.stored import PRELOAD, stored_predictors

if TYPE_CHECKING:
    from service.pipeline import Predictor

logger = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    *,
    predictors: Sequence[Predictor] | None = None,
    predictor_factory: PredictorFactory | None = None,
    detector: Callable[[Metrics], Detector] | None = None,
    registry: CollectorRegistry | None = None,
) -> FastAPI:
    """Build the service.

    Args:
        predictors: what to serve, in this process, instead of the models of the store.
        predictor_factory: loads the models in each worker process, to which it is pickled; None for the models of the
            store.
        detector: makes a detector that runs the models elsewhere; None for workers of this process.
        registry: for the metrics; a new one if None.
    """
    measures = Metrics(registry or CollectorRegistry())
    runs_models = detector(measures) if detector else _build_detector(settings, measures, predictors, predictor_factory)
    state = ApiState(
        settings=settings,
        keys=Keys(settings),
        metrics=measures,
        detector=runs_models,
        admission=Admission(runs_models, metrics=measures),
        models=LoadedModels(settings.default_model),
        lifecycle=Lifecycle(),
        held_bytes=HeldBytes(settings.max_held_bytes),
        changing_models=asyncio.Lock(),
        quotas=Quotas(settings),
        tracer=None if settings.otlp_endpoint is None else Tracer(settings.otlp_endpoint, version=version("roiserve")),
        label_studio_images=label_studio_images(settings),
    )
    measures.ready.set_function(lambda: state.is_ready)
    measures.queue_limit_images.set(settings.max_queue_size)
    measures.queue_limit_pixels.set(settings.max_queue_pixels)

    app = FastAPI(
        title="RoIServe",
        summary="Images in; boxes, labels, scores and masks out.",
        version=version("roiserve"),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would lead to whatever Host the caller named
        lifespan=partial(_lifespan, state),
    )
    app.state.api = state
    # Level 1 costs the least time. Starlette compresses large answers in a thread, and leaves pictures as they are.
    app.add_middleware(GZipMiddleware, minimum_size=1024, compresslevel=1)
    app.add_middleware(RequestMiddleware, state=state)
    routers = _routers(settings)
    for router in routers:
        app.include_router(router)
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    paths = [route.path for route in routes if "{" not in route.path]
    add_error_handlers(app, measures, paths=list(dict.fromkeys(paths)))
    describe_app(app, state.keys)
    return app


@asynccontextmanager
async def _lifespan(state: ApiState, app: FastAPI) -> AsyncIterator[None]:
    async with management_server(state):
        loading = asyncio.create_task(_get_ready(state, app.openapi))
        yield
        loading.cancel()
        with suppress(asyncio.CancelledError):
            await loading
        await state.detector.stop()
    if state.tracer is not None:
        await asyncio.to_thread(state.tracer.stop)


def _routers(settings: Settings) -> list[APIRouter]:
    """All routes. With a port of their own, probes and metrics are not among them."""
    own_port = settings.admin_port is not None
    further = settings.health_route or settings.predict_route
    return [
        detect.router,
        models.router,
        *([] if own_port else [health.router, metrics.router]),
        docs.router,
        start.router,
        v2.probes,
        v2.models,
        hugging_face.router,
        roboflow.probes,
        roboflow.router,
        label_studio.router,
        cvat.router,
        predict.probes,
        predict.router,
        *([predict.further_routes(settings)] if further else []),
    ]


def _build_detector(
    settings: Settings,
    metrics: Metrics,
    predictors: Sequence[Predictor] | None,
    factory: PredictorFactory | None,
) -> Detector:
    if predictors is None and settings.workers != 0:
        return WorkerPool(settings, factory or stored_predictors, metrics, preload=PRELOAD)
    # Imported here: a server with worker processes need not import what they run.
    from service.workers.local import LocalDetector

    local_factory = (factory or stored_predictors) if predictors is None else lambda _: iter(predictors)
    return LocalDetector(settings, local_factory, metrics.observe)


async def _get_ready(state: ApiState, describe: Callable[[], object]) -> None:
    """Prepare the description of the API and load the models; then be ready, or say what failed."""
    begin = time.monotonic()
    logger.info("loading models", extra={"fields": {"hint": "the first start compiles kernels, which takes a minute"}})
    try:
        await asyncio.to_thread(describe)
        for info in await state.detector.start():
            state.add_model(info)
        state.models.find(None)  # If the default model is not among them, say so now rather than in a request.
    except Exception as error:
        # The server watches for this and stops.
        state.lifecycle.failure = error
        is_known = isinstance(error, ServiceError)
        logger.error(f"cannot start: {error}", exc_info=None if is_known else error)
        return
    state.lifecycle.has_models = True
    if state.lifecycle.phase is Phase.LOADING:
        state.lifecycle.phase = Phase.READY
    fields = {"models": ",".join(info.key for info in state.models), "seconds": round(time.monotonic() - begin, 1)}
    url = state.lifecycle.url
    links = {} if url is None else {"url": url, "docs": f"{url}/docs"}
    logger.info("ready", extra={"fields": {**links, **fields}})
