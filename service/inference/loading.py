"""From a stored model to a predictor: choose device, precision and engine, build the network, load the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from service.devices import Device, choose_device
from service.errors import ModelStoreError, ServiceError, first_line
from service.inference.engines.choosing import keep_kernels, put_engine, why_not_int8
from service.inference.half import PrecisionError
from service.inference.predictor import Predictor
from service.inference.verification import Reference
from service.model_store.files import check_safetensors
from service.model_store.store import StoredModel
from service.model_store.weights import check_fits, load_into, without_scales
from service.modeling.buckets import derive_buckets, round_up
from service.modeling.build import build_model
from service.modeling.config import ModelConfig, PatchOp
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.structures import ModelInfo

logger = logging.getLogger(__name__)

_BUCKETS_DIVISIBLE = 32
"""The coarsest stride of the usual backbones."""


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
        precision: `float32`; `tf32`, `float16` or `bfloat16` for convolutions and matrix products; `int8` for what a
            quantised model has in int8; see `choose_precision` for `auto`.
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
        precision=choose_precision(precision, engine=engine, device=target, stored=stored),
        engine=engine,
        cache_dir=cache_dir,
        searching=searching,
        buckets=buckets,
    )
    fallbacks = _fallbacks(order, asked_precision=precision)
    keep_kernels(cache_dir)
    try:
        with target.use():
            try:
                return _load(order, fallbacks=fallbacks)
            except PrecisionError as error:
                if not fallbacks or precision != "auto":
                    raise
                fields = {"model": stored.key, "precision": fallbacks[0].precision, "reason": str(error)}
                logger.warning("this model cannot run in its fastest precision", extra={"fields": fields})
                return _load(fallbacks[0], fallbacks=fallbacks[1:])
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


def _fallbacks(order: _Order, *, asked_precision: str) -> Sequence[_Order]:
    """What to load instead if the network fails its verification, best first. There is no replacement for an engine or
    a precision that was requested by name.
    """
    fallbacks: list[_Order] = []
    if order.precision == "int8" and asked_precision == "auto":
        fallbacks.append(replace(order, precision="float32"))
    if order.engine == "auto" and asked_precision != "int8":
        precision = "float32" if asked_precision == "auto" else order.precision
        fallbacks.append(replace(order, engine="eager", precision=precision))
    return [fallback for fallback in fallbacks if fallback != order]


def _load(order: _Order, *, fallbacks: Sequence[_Order]) -> Predictor:
    """Build the network, load the weights, and install the engine.

    Args:
        order: what is wanted.
        fallbacks: what to load instead if this network fails its verification, best first; if empty, that is an error.
    """
    config, device, precision = order.config, order.device, order.precision
    if precision not in device.precisions:
        raise ServiceError(f"precision {precision!r} is not for {device.label}: it has {', '.join(device.precisions)}")
    model = _build_and_fill(order)
    try:
        int8 = order.stored.model_toml.int8
        tolerances = {} if int8 is None else int8.tolerances.model_dump()
        reference = Reference(model, config=config, device=device, int8_tolerances=tolerances)
        placed = put_engine(
            model,
            engine=order.engine,
            device=device,
            precision=precision,
            key=config.model_dump_json(),
            cache_dir=order.cache_dir,
            quantizers=order.stored.load_quantizers(),
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
        placed=placed,
        reference=None if (placed.engine, precision) == ("eager", "float32") else reference,
        fallback=partial(_load, fallbacks[0], fallbacks=fallbacks[1:]) if fallbacks else None,
    )


def _build_and_fill(order: _Order) -> GeneralizedRCNN:
    """The network with its weights, on its device."""
    stored, config, source = order.stored, order.config, str(order.stored.path)
    # First on the meta device, which uses no memory: mismatched weights are rejected before a possibly huge network is
    # allocated.
    with torch.device("meta"):
        check_fits(build_model(config), without_scales(check_safetensors(stored.weights_path)), source=source)
    model = build_model(config)
    weights = stored.load_weights()
    infinite = [name for name, value in weights.items() if not value.isfinite().all()]
    if infinite:
        raise ModelStoreError(f"{source}: expected finite weights, got others in {infinite[0]}")
    load_into(model, weights, source=source)
    if order.buckets is not None:
        sizes = config.transform
        multiple = math.lcm(sizes.size_divisible, _BUCKETS_DIVISIBLE)
        named = tuple(round_up(size, multiple) for size in order.buckets)
        model.transform.buckets = named or derive_buckets(sizes.min_size, sizes.max_size, multiple)
    return model.to(order.device.torch_device).eval()


def describe(
    config: ModelConfig, *, name: str, version: int, precision: str, device: str, engine: str = "eager"
) -> ModelInfo:
    """The public description of a network with this configuration; the other arguments are copied into it."""
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
        mask_style=config.masks.style,
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


def choose_precision(precision: str, *, engine: str, device: Device, stored: StoredModel | None = None) -> str:
    """Resolve `auto`: int8 for a quantised model on a processor made for that; else the device's half precision if that
    is faster; always float32 with `eager`.

    Args:
        precision: as configured.
        engine: as configured.
        device: where the network is.
        stored: the model; None if it is certainly not quantised.

    Raises:
        ServiceError: int8 was asked for by name, and this model has none or cannot run in it here.
    """
    table = None if stored is None else stored.model_toml.int8
    if precision == "int8" and device.fastest_engine == "openvino" and stored is not None and table is None:
        raise ServiceError(
            f"{stored.key} is not quantised: `roiserve quantize --model {stored.key} --data DIR/train.json` writes a "
            "version that is, else choose another precision"
        )
    if precision == "int8" and (problem := why_not_int8(engine=engine, device=device)) is not None:
        raise ServiceError(problem)
    if precision != "auto":
        return precision
    half = "float32" if engine == "eager" else device.half_precision
    if stored is None or table is None:
        return half
    problem = why_not_int8(engine=engine, device=device) or _why_no_fast_int8()
    if problem is None:
        return "int8"
    fields = {"model": stored.key, "precision": half, "reason": problem}
    logger.info("a quantised model does not run in int8", extra={"fields": fields})
    return half


def _why_no_fast_int8() -> str | None:
    # Imported here: an optional extra that may not be installed.
    from service.inference.engines.openvino import has_int8

    return None if has_int8() else "this processor has no instructions for int8 (VNNI or AMX)"
