"""Wires the rooms together, the only place that does: `create_app(settings)`. Its lifespan starts what has threads,
loads the models while the server already listens, and stops everything in reverse.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry

from service import masks
from service.api import detect, docs, health, metrics, models
from service.api.errors import add_error_handlers
from service.api.middleware import RequestMiddleware
from service.api.openapi import describe_app
from service.api.state import ApiState, Lifecycle, LoadedModels, Phase
from service.batching.batcher import Batcher
from service.batching.held_bytes import HeldBytes
from service.errors import ModelNotFoundError, ModelStoreError, ServiceError
from service.imaging.decode import ImageLimits
from service.metrics import Metrics
from service.pipeline import Pipeline, Predictor, Work, predict_batch
from service.settings import Settings
from service.structures import Prediction

logger = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    *,
    predictors: Sequence[Predictor] | None = None,
    registry: CollectorRegistry | None = None,
) -> FastAPI:
    """Build the service.

    Args:
        predictors: what to serve instead of the models of the store.
        registry: for the metrics; a new one if None.
    """
    measures = Metrics(registry or CollectorRegistry())
    batcher: Batcher[Work, Prediction] = Batcher(
        partial(predict_batch, metrics=measures),
        max_batch_size=settings.max_batch_size,
        max_batch_cost=settings.max_batch_pixels,
        max_queue_size=settings.max_queue_size,
        max_queue_cost=settings.max_queue_pixels,
        max_batch_wait_seconds=settings.max_batch_wait_ms / 1000,
    )
    decoders = ThreadPoolExecutor(settings.decode_threads, "decode")
    encoders = ThreadPoolExecutor(settings.decode_threads, "encode")
    state = ApiState(
        settings=settings,
        metrics=measures,
        pipeline=Pipeline(
            batcher=batcher,
            decoders=decoders,
            encoders=encoders,
            image_limits=ImageLimits(max_image_pixels=settings.max_image_pixels),
            max_jobs=settings.max_queue_size + settings.max_batch_size,
            metrics=measures,
        ),
        models=LoadedModels(settings.default_model),
        lifecycle=Lifecycle(),
        held_bytes=HeldBytes(settings.max_held_bytes),
    )

    source = _stored_predictors(settings) if predictors is None else iter(predictors)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await batcher.start()
        loading = asyncio.create_task(_get_ready(state, source, [masks.warm_up, app.openapi]))
        yield
        loading.cancel()
        with suppress(asyncio.CancelledError):
            await loading
        # The server has waited for the requests: whatever the device is still at, nobody wants it.
        await batcher.stop(drain_timeout_seconds=0)
        decoders.shutdown(wait=False, cancel_futures=True)
        encoders.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="RoIServe",
        summary="Images in; boxes, labels, scores and masks out.",
        version=version("roiserve"),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would lead to whatever Host the caller named
        lifespan=lifespan,
    )
    app.state.api = state
    app.add_middleware(RequestMiddleware, state=state)
    routers = [resource.router for resource in (detect, models, health, metrics, docs)]
    for router in routers:
        app.include_router(router)
    paths = [route.path for router in routers for route in router.routes if isinstance(route, APIRoute)]
    add_error_handlers(app, measures, paths=list(dict.fromkeys(paths)))
    describe_app(app)
    return app


async def _get_ready(
    state: ApiState, predictors: Iterator[Predictor], preparations: Sequence[Callable[[], object]]
) -> None:
    """Prepare, then load and warm up one model after the other, all in threads; then be ready, or say what failed.

    Args:
        preparations: what would hold up the first request that needs it.
    """
    try:
        for prepare in preparations:
            await asyncio.to_thread(prepare)
        while (predictor := await asyncio.to_thread(_next_warm, predictors)) is not None:
            state.models.add(predictor)
            key = predictor.info.key
            state.metrics.add_model(
                predictor.info,
                queue_depth=partial(state.pipeline.queue_depth, key),
                queue_pixels=partial(state.pipeline.queue_pixels, key),
            )
            logger.info("model ready", extra={"fields": {"model": key, "device": predictor.info.device}})
        state.models.find(None)  # If the default model is not among them, say so now rather than in a request.
    except Exception as error:
        # Whoever runs the server watches for this and stops it.
        state.lifecycle.failure = error
        is_known = isinstance(error, ServiceError)
        logger.error("cannot start", extra={"fields": {"reason": str(error)}}, exc_info=None if is_known else error)
        return
    if state.lifecycle.phase is Phase.LOADING:
        state.lifecycle.phase = Phase.READY
    logger.info("ready")


def _next_warm(predictors: Iterator[Predictor]) -> Predictor | None:
    predictor = next(predictors, None)
    if predictor is not None:
        predictor.warm_up()
    return predictor


def _stored_predictors(settings: Settings) -> Iterator[Predictor]:
    """The models that the settings name, each loaded when it is asked for.

    If they name none, the newest of each name that is not broken.

    Raises:
        ModelNotFoundError: one that the settings name, or the default model, is not there; before any is loaded.
        ModelStoreError: one that the settings name is broken, or all are.
    """
    # Imported here, in the loading thread, because torch takes seconds and probes want an answer meanwhile.
    from service.inference.loading import load_predictor
    from service.model_store.store import ModelStore, StoredModel

    store = ModelStore(settings.model_store)
    known = store.list()
    # For each model that is to be served, the versions that may be it, best first. One named twice is loaded once.
    if settings.models:
        choices = {stored.key: [stored] for stored in map(store.find, settings.models)}
    else:
        choices = {one.name: [other for other in reversed(known) if other.name == one.name] for one in known}
    names = {name for choice in choices.values() for stored in choice for name in (stored.name, stored.key)}
    if settings.default_model is not None and settings.default_model not in names:
        words = ", ".join(sorted(names)) or "none"
        raise ModelNotFoundError(f"no default model {settings.default_model!r} among those to load; known: {words}")

    def load_first_good(choice: Sequence[StoredModel]) -> Predictor | None:
        for stored in choice:
            logger.info("loading model", extra={"fields": {"model": stored.key}})
            try:
                return load_predictor(stored, device=settings.device, precision=settings.precision)
            except ModelStoreError as error:
                if settings.models:
                    raise
                logger.error("model is broken", extra={"fields": {"model": stored.key, "reason": str(error)}})
        return None

    are_all_broken = bool(choices)
    for choice in choices.values():
        if (predictor := load_first_good(choice)) is not None:
            are_all_broken = False
            yield predictor
    if are_all_broken:
        raise ModelStoreError(f"every model in {store.root} is broken")
