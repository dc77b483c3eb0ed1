"""Choose the engine that runs a network, and install it."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.devices import Device
from service.errors import ServiceError, first_line
from service.inference.engines.compiled import CompiledNetwork, keep_compiled_code
from service.inference.engines.folding import fold
from service.inference.engines.graphs import GraphedDetector, why_not_recorded
from service.inference.half import DTYPES, HalfNetwork, PrecisionError
from service.model_store.quantizers import Quantizers
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.poolers import RoIPooler

logger = logging.getLogger(__name__)

COMPILING = ("compiled", "graphs")
"""Engines whose parts are compiled by torch."""
_OPENVINO_PRECISIONS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True, slots=True)
class Placed:
    """What runs a network now.

    Attributes:
        engine: `eager`, `compiled`, `graphs` or `openvino`.
        half: casts the weights to half precision; None for float32 and for `openvino`, which has its own copy of the
            weights.
        find_problem: call it after a batch has run; returns why the engine is not doing what its name says, or None if
            it is.
        take_uncompiled: returns the parts that `compiled` ran uncompiled since its last call.
        graphs: runs whole batches; None except with `graphs`.
    """

    engine: str
    half: HalfNetwork | None = None
    find_problem: Callable[[], str | None] = lambda: None
    take_uncompiled: Callable[[], Sequence[str]] = tuple
    graphs: GraphedDetector | None = None


EAGER = Placed("eager")
"""The network's own modules."""


def put_engine(
    model: GeneralizedRCNN,
    *,
    engine: str,
    device: Device,
    precision: str,
    key: str,
    cache_dir: Path | None,
    quantizers: Quantizers | None = None,
) -> Placed:
    """Replace the network's parts by an engine's, in place.

    Args:
        model: loaded, in evaluation mode, on its device. It can no longer be trained.
        engine: `eager`, `compiled`, `graphs`, `openvino`, or `auto` for the device's fastest.
        device: where the network is.
        precision: one of the device's.
        key: names the network's weights and configuration.
        cache_dir: where an engine may keep what it compiles; the user's cache folder if None.
        quantizers: what runs in int8; needed for that precision, and only used by it.

    Returns:
        The engine now in use. `auto` falls back to `eager` if the fastest engine cannot run this model.

    Raises:
        ServiceError: the engine is not installed, or does not support this device and precision.
        PrecisionError: see `HalfNetwork`; or the model cannot run in int8 here.
    """
    chosen = device.fastest_engine if engine == "auto" else engine
    folder = _cache_folder(cache_dir)
    if chosen in COMPILING and folder is not None:
        keep_compiled_code(folder)
    fold(model)
    problem = _why_not(chosen, model, device, precision)
    if problem is None and chosen == "openvino":
        used = quantizers if precision == "int8" else None
        problem = _put_openvino(model, key=key, precision=precision, cache_dir=cache_dir, quantizers=used)
        if problem is None:
            return Placed(chosen)
    if problem is not None:
        if precision == "int8":
            raise PrecisionError(problem)
        if engine != "auto":
            raise ServiceError(problem)
        fields = {"engine": "eager", "reason": problem}
        logger.info("the fastest engine cannot run this model", extra={"fields": fields})
        chosen = "eager"
    half = HalfNetwork(model, precision) if precision in DTYPES else None
    if chosen in COMPILING:
        return _put_compiled(model, engine=chosen, device=device, half=half)
    if half is not None:
        model.parts = half.wrapped(model.own_parts())
    return Placed(chosen, half)


def _put_compiled(model: GeneralizedRCNN, *, engine: str, device: Device, half: HalfNetwork | None) -> Placed:
    network = CompiledNetwork(model)
    model.parts = network.parts() if half is None else half.wrapped(network.parts())
    graphs = None
    if engine == "graphs":
        graphs = GraphedDetector(model, device=device, take_check=None if half is None else half.take_check)
    return Placed(
        engine,
        half,
        find_problem=lambda: _why_uncompiled(network) or (None if graphs is None else _why_unrecorded(graphs)),
        take_uncompiled=network.take_uncompiled,
        graphs=graphs,
    )


def why_not_int8(*, engine: str, device: Device) -> str | None:
    """Why no model can run in int8 here, as a message; None if a quantised one can.

    Args:
        engine: as configured.
    """
    if device.fastest_engine != "openvino":
        return f"int8 runs on the CPU, not on {device.label}"
    if engine not in ("auto", "openvino"):
        return f"int8 runs on the engine 'openvino', not on {engine!r}"
    if importlib.util.find_spec("openvino") is None:
        return "int8 needs the engine 'openvino', which is not installed: pip install openvino"
    return None


def _put_openvino(
    model: GeneralizedRCNN, *, key: str, precision: str, cache_dir: Path | None, quantizers: Quantizers | None
) -> str | None:
    """Install the engine. Returns the reason if that is impossible, else None."""
    # Imported here: an optional extra that may not be installed.
    from service.inference.engines.int8 import UnfitQuantizersError
    from service.inference.engines.openvino import OpenVinoNetwork, has_bfloat16

    if precision == "bfloat16" and not has_bfloat16():
        return "engine 'openvino' needs a CPU with native bfloat16 (AMX or AVX-512 BF16), which this one lacks"
    folder = _cache_folder(cache_dir)
    if folder is None:
        return "engine 'openvino' finds no home folder to keep compiled parts in: set ROISERVE_ENGINE_CACHE_DIR"
    try:
        network = OpenVinoNetwork(model, key=key, precision=precision, cache_dir=folder, quantizers=quantizers)
        model.parts = network.parts()
    except UnfitQuantizersError as error:
        return f"{error}; these versions of torch and OpenVINO convert it in another way: quantise the model again"
    except RuntimeError as error:
        return f"OpenVINO cannot express this network: {first_line(error)}"
    return None


def keep_kernels(cache_dir: Path | None) -> None:
    """Make Triton cache its kernels beside the engines' compiled code, unless `TRITON_CACHE_DIR` names another folder.
    Call this before the first kernel is launched.
    """
    folder = _cache_folder(cache_dir)
    if folder is not None:
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def _cache_folder(cache_dir: Path | None) -> Path | None:
    """The configured folder, or the user's cache folder if the setting is None; None if there is no home folder."""
    try:
        return cache_dir or Path.home() / ".cache" / "roiserve"
    except RuntimeError:
        return None


def _why_uncompiled(network: CompiledNetwork) -> str | None:
    if not network.uncompiled:
        return None
    return f"the engine did not compile the {' and the '.join(network.uncompiled)} of this network"


def _why_unrecorded(graphs: GraphedDetector) -> str | None:
    return None if graphs.problem is None else f"engine 'graphs' cannot record a batch: {graphs.problem}"


def _why_not(engine: str, model: GeneralizedRCNN, device: Device, precision: str) -> str | None:
    """Why an engine cannot run, as a message that says what to do; None if it can."""
    if engine == "openvino":
        if importlib.util.find_spec("openvino") is None:
            return "engine 'openvino' is not installed: pip install openvino"
        if device.fastest_engine != "openvino":
            return f"engine 'openvino' runs on the CPU, not on {device.label}"
        if precision not in _OPENVINO_PRECISIONS:
            return f"engine 'openvino' runs in {' or '.join(_OPENVINO_PRECISIONS)}, not in {precision}"
    if engine != "eager" and not isinstance(model.roi_heads.box_roi_pool, RoIPooler):
        return f"engine {engine!r} does not run R-CNN, whose network is run on each proposal's pixels"
    if engine == "graphs" and (problem := why_not_recorded(model, device)) is not None:
        return problem
    if engine in COMPILING and device.compiler_problem is not None:
        return f"engine {engine!r} cannot compile here: {device.compiler_problem}"
    return None
