"""Loads the models that the settings name from the model store, as predictors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from service.cores import available_cores
from service.errors import ModelNotFoundError, ModelStoreError, ServiceError
from service.settings import Settings

if TYPE_CHECKING:
    from service.model_store.store import ModelStore, StoredModel
    from service.pipeline import Predictor

logger = logging.getLogger(__name__)

PRELOAD = ("service.workers.process", "service.inference.loading")
"""Modules whose imports take seconds."""


def stored_key(settings: Settings, reference: str) -> str:
    """The key of the stored model that a reference (name or name@version) refers to.

    Raises:
        ModelNotFoundError: there is no such model.
    """
    from service.model_store.store import ModelStore

    return ModelStore(settings.model_store).find(reference).key


def stored_predictors(settings: Settings, *, searching: bool = False) -> Iterator[Predictor]:
    """The models that the settings name, each loaded when the iterator reaches it.

    If the settings name none: of each name, the first version of `ModelStore.by_preference` that is not broken.

    Args:
        settings: which models to load, and how.
        searching: see `load_predictor`.

    Raises:
        ModelNotFoundError: a model that the settings name, or the default model, does not exist; raised before any is
            loaded.
        ServiceError: a model that the settings name cannot be loaded, or no model can.
    """
    # Imported here: the process that serves HTTP only passes this function on, and must answer probes meanwhile.
    from service.inference.loading import load_predictor
    from service.model_store.store import ModelStore

    _share_cores(settings)
    store = ModelStore(settings.model_store)
    known = store.list()
    # For each model to serve, the candidate versions, best first. A model that is named twice is loaded once.
    choices: dict[str, Sequence[StoredModel]]
    if settings.models:
        choices = {stored.key: [stored] for stored in map(store.find, settings.models)}
    else:
        choices = {
            name: _by_preference(store, [one for one in known if one.name == name])
            for name in dict.fromkeys(one.name for one in known)
        }
    names = {name for choice in choices.values() for stored in choice for name in (stored.name, stored.key)}
    if settings.default_model is not None and settings.default_model not in names:
        words = ", ".join(sorted(names)) or "none"
        raise ModelNotFoundError(f"no default model {settings.default_model!r} among those to load; known: {words}")

    def load(stored: StoredModel) -> Predictor:
        logger.info("loading model", extra={"fields": {"model": stored.key}})
        return load_predictor(
            stored,
            device=settings.device,
            precision=settings.precision,
            engine=settings.engine,
            cache_dir=settings.engine_cache_dir,
            searching=searching,
            buckets=settings.buckets,
        )

    are_all_broken = bool(choices)
    for choice in choices.values():
        for stored in choice:
            try:
                # No local variable for it: the consumer may drop the model and want its memory released.
                yield load(stored)
            except ServiceError as error:
                if settings.models:
                    raise
                logger.error("model is broken", extra={"fields": {"model": stored.key, "reason": str(error)}})
            else:
                are_all_broken = False
                break
    if are_all_broken:
        raise ModelStoreError(f"every model in {store.root} is broken")


def _by_preference(store: ModelStore, versions: Sequence[StoredModel]) -> Sequence[StoredModel]:
    """The versions of one name, best first; none if the store does not say validly which that is."""
    try:
        return store.by_preference(versions)
    except ModelStoreError as error:
        logger.error("model is broken", extra={"fields": {"model": versions[0].name, "reason": str(error)}})
        return []


def _share_cores(settings: Settings) -> None:
    """Give each worker its part of the cores that the service may use."""
    from torch import get_num_threads as get_torch_threads
    from torch import set_num_threads as set_torch_threads

    from service.devices import choose_device

    workers = max(1, settings.workers or 1) if choose_device(settings.device).label == "cpu" else 1
    # OMP_NUM_THREADS, which torch follows, may ask for fewer.
    threads = min(get_torch_threads(), max(1, available_cores() // workers))
    set_torch_threads(threads)  # OpenVINO and our own loops take as many as torch
