"""From a stored model to a predictor: choose device, precision and engine, build the network, load the weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from service.devices import Device, choose_device
from service.errors import ModelStoreError, ServiceError, first_line
from service.inference.engines.choosing import keep_kernels, put_engine
from service.inference.half import PrecisionError
from service.inference.predictor import Predictor
from service.inference.verification import Reference
from service.model_store.files import check_safetensors
from service.model_store.store import StoredModel
from service.model_store.weights import check_fits, load_into
from service.modeling.buckets import derive_buckets, round_up
from service.modeling.build import build_model
from service.modeling.config import ModelConfig, PatchOp
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.structures import ModelInfo

logger = logging.getLogger(__name__)


def load_predictor(
    stored: StoredModel,
    *,
    device: str = "auto",
    precision: str = "auto",
    engine: str = "auto",
    cache_dir: Path | None = None,
    searching: bool = False,
    buckets: Sequence[tuple[int, int]] | None = None,
) -> Predictor:
    """Load a model onto a device.

    Args:
        stored: the model's folder.
        device: see `choose_device`.
        precision: `float32`; `tf32`, `float16` or `bfloat16` for convolutions and matrix products; see
            `choose_precision` for `auto`.
        engine: `eager`, `compiled` or `openvino`; `auto` for the fastest available.
        cache_dir: where an engine caches compiled code for the next start; the user's cache folder if None.
        searching: whether a network that normally takes its proposals from the caller finds them itself when it gets
            none.
        buckets: (height, width) of the sizes to which resized images are padded, in pixels, see `Transform`; empty to
            derive them from the model's sizes, None to pad each image as little as possible.

    Raises:
        ModelStoreError: the folder, its configuration or its weights are invalid, there is not enough memory for the
            network, or it computes infinities or NaN.
        ServiceError: the device or the engine is not available.
    """
    target = choose_device(device)
    order = _Order(
        stored=stored,
        device=target,
        precision=choose_precision(precision, engine=engine, device=target),
        engine=engine,
        cache_dir=cache_dir,
        searching=searching,
        buckets=buckets,
    )
    # There is no fallback for an engine or a precision that was requested by name.
    plan_b = None
    if engine == "auto":
        plan_b = replace(order, engine="eager", precision="float32" if precision == "auto" else order.precision)
    keep_kernels(cache_dir)
    try:
        with target.use():
            try:
                return _load(order, plan_b=None if plan_b == order else plan_b)
            except PrecisionError as error:
                if plan_b is None or precision != "auto":
                    raise
                fields = {"model": stored.key, "precision": plan_b.precision, "reason": str(error)}
                logger.warning("half precision cannot hold this model", extra={"fields": fields})
                return _load(plan_b, plan_b=None)
    except ServiceError:
        raise
    except Exception as error:
        # Any failure here concerns this model only: the caller gets the message, the log gets the rest.
        logger.info("a model cannot be loaded", extra={"fields": {"model": stored.key}}, exc_info=error)
        if target.is_out_of_memory(error):
            raise ModelStoreError(f"{stored.key}: not enough memory for its network") from error
        raise ModelStoreError(f"{stored.key}: cannot be loaded: {first_line(error)}") from error


@dataclass(frozen=True, slots=True)
class _Order:
    """What to load, and how. `precision` is never `auto`."""

    stored: StoredModel
    device: Device
    precision: str
    engine: str
    cache_dir: Path | None
    searching: bool
    buckets: Sequence[tuple[int, int]] | None

    @property
    def config(self) -> ModelConfig:
        return self.stored.model_toml.searching() if self.searching else self.stored.model_toml


def _load(order: _Order, *, plan_b: _Order | None) -> Predictor:
    """Build the network, load the weights, and install the engine.

    Args:
        order: what is wanted.
        plan_b: what to load instead if this network fails its verification; None if that is an error.
    """
    config, device, precision = order.config, order.device, order.precision
    if precision not in device.precisions:
        raise ServiceError(f"precision {precision!r} is not for {device.label}: it has {', '.join(device.precisions)}")
    model = _build_and_fill(order)
    try:
        reference = Reference(model, config=config, device=device)
        placed = put_engine(
            model,
            engine=order.engine,
            device=device,
            precision=precision,
            key=config.model_dump_json(),
            cache_dir=order.cache_dir,
        )
    except ModelStoreError as error:
        raise type(error)(f"{order.stored.key}: {error}") from error
    info = describe(
        config,
        name=order.stored.name,
        version=order.stored.version,
        engine=placed.engine,
        precision=precision,
        device=device.label,
    )
    return Predictor(
        model,
        info=info,
        device=device.torch_device,
        half=placed.half,
        reference=None if (placed.engine, precision) == ("eager", "float32") else reference,
        find_problem=placed.find_problem,
        plan_b=None if plan_b is None else partial(_load, plan_b, plan_b=None),
    )


def _build_and_fill(order: _Order) -> GeneralizedRCNN:
    """The network with its weights, on its device."""
    stored, config, source = order.stored, order.config, str(order.stored.path)
    # First on the meta device, which uses no memory: mismatched weights are rejected before a possibly huge network is
    # allocated.
    with torch.device("meta"):
        check_fits(build_model(config), check_safetensors(stored.weights_path), source=source)
    model = build_model(config)
    weights = stored.load_weights()
    infinite = [name for name, value in weights.items() if not value.isfinite().all()]
    if infinite:
        raise ModelStoreError(f"{source}: expected finite weights, got others in {infinite[0]}")
    load_into(model, weights, source=source)
    if order.buckets is not None:
        sizes = config.transform
        model.transform.buckets = tuple(map(round_up, order.buckets)) or derive_buckets(sizes.min_size, sizes.max_size)
    return model.to(order.device.torch_device).eval()


def describe(
    config: ModelConfig, *, name: str, version: int, precision: str, device: str, engine: str = "eager"
) -> ModelInfo:
    """The public description of a network with this configuration."""
    return ModelInfo(
        name=name,
        version=version,
        architecture=config.architecture,
        backbone=config.backbone.name,
        roi_op=config.roi.op,
        labels=config.labels,
        score_thresh=config.detections.score_thresh,
        max_detections=config.detections.detections_per_img,
        has_masks=config.has_masks,
        engine=engine,
        precision=precision,
        device=device,
        roi_ops=interchangeable_ops(config),
        needs_proposals=config.needs_proposals,
    )


def interchangeable_ops(config: ModelConfig) -> tuple[str, ...]:
    """The RoI operators that can replace the configured one in both branches: those that return a patch of the same
    size with the configured number of sampling points.
    """
    patch_ops: tuple[str, ...] = get_args(PatchOp)
    if config.roi.op not in patch_ops:
        return ()
    is_adaptive = 0 in (config.roi.sampling_ratio, config.roi.mask_branch().sampling_ratio)
    return tuple(op for op in patch_ops if not (op == "roi_warp" and is_adaptive))


def choose_precision(precision: str, *, engine: str, device: Device) -> str:
    """Resolve `auto`: the device's half precision if that is faster; always float32 with `eager`.

    Args:
        precision: as configured.
        engine: as configured.
        device: where the network is.
    """
    if precision != "auto":
        return precision
    return "float32" if engine == "eager" else device.half_precision
