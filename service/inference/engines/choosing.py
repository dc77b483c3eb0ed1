"""Which engine runs a network, and putting it in place. Called by `loading.py`."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import torch

from service.errors import ServiceError
from service.inference.engines.compiled import check_compiler, compiled_parts
from service.inference.engines.folding import fold
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.poolers import RoIPooler

logger = logging.getLogger(__name__)

_OPENVINO_PRECISIONS = ("float32", "bfloat16")


def put_engine(
    model: GeneralizedRCNN,
    *,
    engine: str,
    device: torch.device,
    precision: str,
    key: str,
    cache_dir: Path | None,
) -> str:
    """Let an engine run the network's parts, in place.

    Args:
        model: loaded, in evaluation mode, on its device. It can no longer be trained.
        engine: `eager`, `compiled`, `openvino`, or `auto` for the fastest: `compiled` on CUDA, `openvino` on the CPU.
        device: where the network is.
        precision: `float32`, `float16` or `bfloat16`.
        key: names the network's weights and configuration.
        cache_dir: where an engine may keep what it compiles; the user's cache folder if None.

    Returns:
        The name of the engine that runs it now: with `auto`, `eager` where the fastest cannot.

    Raises:
        ServiceError: the engine is not there, or not for this device and precision.
    """
    chosen = engine
    if engine == "auto":
        chosen = "compiled" if device.type == "cuda" else "openvino"
    problem = _why_not(chosen, model, device, precision)
    fold(model)
    if problem is None and chosen == "openvino":
        problem = _put_openvino(model, key=key, precision=precision, cache_dir=cache_dir)
    elif problem is None and chosen == "compiled":
        problem = _put_compiled(model, device)
    if problem is None:
        return chosen
    if engine != "auto":
        raise ServiceError(problem)
    logger.info("the fastest engine cannot run this model", extra={"fields": {"engine": "eager", "reason": problem}})
    return "eager"


def _put_openvino(model: GeneralizedRCNN, *, key: str, precision: str, cache_dir: Path | None) -> str | None:
    """Put the engine in place; returns why it cannot be, None if it is."""
    # Imported here: an extra, that need not be installed.
    from service.inference.engines.openvino import OpenVinoNetwork, has_bfloat16

    if precision == "bfloat16" and not has_bfloat16():
        return "engine 'openvino' runs in bfloat16 on processors that have it (AMX, AVX-512 BF16), and this one has not"
    try:
        folder = cache_dir or Path.home() / ".cache" / "roiserve"
    except RuntimeError:
        return "engine 'openvino' finds no home folder to keep compiled parts in: set ROISERVE_ENGINE_CACHE_DIR"
    try:
        model.parts = OpenVinoNetwork(model, key=key, precision=precision, cache_dir=folder).parts()
    except RuntimeError as error:
        # The first line says it; behind it there may be whole weights.
        return f"OpenVINO cannot express this network: {str(error).partition(chr(10))[0]}"
    return None


def _put_compiled(model: GeneralizedRCNN, device: torch.device) -> str | None:
    """As `_put_openvino`."""
    try:
        check_compiler(device)
    except Exception as error:  # Many kinds, by what is missing.
        return f"engine 'compiled' cannot compile here: {error}"
    model.parts = compiled_parts(model)
    return None


def _why_not(engine: str, model: GeneralizedRCNN, device: torch.device, precision: str) -> str | None:
    """Why an engine cannot run, in a sentence that says what to do; None if it can."""
    if engine == "openvino":
        if importlib.util.find_spec("openvino") is None:
            return "engine 'openvino' is not installed: pip install 'roiserve[openvino]'"
        if device.type != "cpu":
            return f"engine 'openvino' runs on the CPU, not on {device}"
        if precision not in _OPENVINO_PRECISIONS:
            return f"engine 'openvino' runs in {' or '.join(_OPENVINO_PRECISIONS)}, not in {precision}"
    if engine != "eager" and not isinstance(model.roi_heads.box_roi_pool, RoIPooler):
        return f"engine {engine!r} does not run R-CNN, whose network is run on each proposal's pixels"
    return None
