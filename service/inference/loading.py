"""From a stored model to a predictor: choose device, precision and engine, build the network, load the weights."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch

from service.errors import ServiceError
from service.inference.engines.choosing import put_engine
from service.inference.predictor import Predictor
from service.model_store.files import check_safetensors
from service.model_store.store import StoredModel
from service.model_store.weights import check_fits, load_into
from service.modeling.build import build_model
from service.modeling.config import ModelConfig, PatchOp
from service.structures import ModelInfo

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def load_predictor(
    stored: StoredModel,
    *,
    device: str = "auto",
    precision: str = "auto",
    engine: str = "auto",
    cache_dir: Path | None = None,
    searching: bool = False,
) -> Predictor:
    """Load a model onto a device.

    Args:
        stored: the model's folder.
        device: `auto` (CUDA if there is any, else the CPU), `cpu`, `cuda`, `cuda:1`, ….
        precision: `float32`, or `float16` or `bfloat16` for convolutions and matrix products; see `choose_precision`
            for `auto`.
        engine: `eager`, `compiled` or `openvino`; `auto` for the fastest that there is.
        cache_dir: where an engine keeps what it compiled, for the next start; the user's cache folder if None.
        searching: whether a network that is given its proposals by the caller finds them itself where it gets none.

    Raises:
        ModelStoreError: the folder, its configuration or its weights are not as they must be.
        ServiceError: the device or the engine is not there.
    """
    config: ModelConfig = stored.model_toml.searching() if searching else stored.model_toml
    target = choose_device(device)
    precision = choose_precision(precision, engine=engine, device=target)
    # First without memory: a network of hundreds of gigabytes is refused for weights that are not its own.
    with torch.device("meta"):
        check_fits(build_model(config), check_safetensors(stored.weights_path), source=str(stored.path))
    model = build_model(config)
    load_into(model, stored.load_weights(), source=str(stored.path))
    model = model.to(target).eval()
    engine = put_engine(
        model, engine=engine, device=target, precision=precision, key=config.model_dump_json(), cache_dir=cache_dir
    )
    info = describe(
        config, name=stored.name, version=stored.version, engine=engine, precision=precision, device=str(target)
    )
    # OpenVINO's own parts are in this precision already; what lies between them stays in float32.
    autocast_dtype = None if engine == "openvino" else DTYPES.get(precision)
    return Predictor(model, info=info, device=target, autocast_dtype=autocast_dtype)


def describe(
    config: ModelConfig, *, name: str, version: int, precision: str, device: str, engine: str = "eager"
) -> ModelInfo:
    """What callers may know of a network of this configuration."""
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
    """The RoI operators that may take the place of the configured one in both branches: those that give a patch of the
    same size, with the configured number of points.
    """
    patch_ops: tuple[str, ...] = get_args(PatchOp)
    if config.roi.op not in patch_ops:
        return ()
    is_adaptive = 0 in (config.roi.sampling_ratio, config.roi.mask_branch().sampling_ratio)
    return tuple(op for op in patch_ops if not (op == "roi_warp" and is_adaptive))


def choose_precision(precision: str, *, engine: str, device: torch.device) -> str:
    """What `auto` means: float16 on CUDA, whose matrix units have it; float32 on the CPU and by `eager`.

    Args:
        precision: as a setting has it.
        engine: as a setting has it.
        device: where the network is.
    """
    if precision != "auto":
        return precision
    return "float16" if device.type == "cuda" and engine != "eager" else "float32"


def choose_device(device: str) -> torch.device:
    """The device that a setting means.

    Raises:
        ServiceError: it is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ServiceError(f"expected the device auto, cpu, cuda or cuda:N, got {device!r}") from None
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ServiceError(f"no device {device!r}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return target
