"""The Open Inference Protocol, version 2, as spoken by KServe, Triton and their clients: a model takes encoded images
or raw pixels as the tensor `image`, and answers `boxes`, `labels`, `scores`, `masks` and `image_index`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version as version_of
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Header, Response
from numpy.typing import NDArray

from service.api.ask import Ask, Asked
from service.api.auth import require_admin_key, require_key
from service.api.health import live as is_live
from service.api.health import ready as is_ready
from service.api.models import Name
from service.api.openapi import PICTURE_SCHEMA, describe_json, describe_plain_errors
from service.api.schemas import json_response, pieces_response
from service.api.state import ApiState, State
from service.api.v2_tensors import InferRequest, Output, ParsedRequest, parse_request, write_answer
from service.errors import InvalidRequestError
from service.structures import ALL_EXTRAS, ModelInfo, Tensors
from service.tensors import read_tensors

probes = APIRouter(prefix="/v2", tags=["open inference protocol"], responses=describe_plain_errors(503))
models = APIRouter(
    prefix="/v2",
    tags=["open inference protocol"],
    dependencies=[Depends(require_key)],
    responses=describe_plain_errors(401, 403, 404, 408, 413, 415, 422, 503),
)

HeaderLength = Annotated[
    str | None,
    Header(alias="Inference-Header-Content-Length", description="Bytes of JSON before the binary data; 0: one image."),
]

# A body up to this size is parsed faster than a thread starts, and such an answer written.
_QUICK_BYTES = 16 * 1024
_PLATFORM = "roiserve"
_EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
_OUTPUTS: dict[str, tuple[str, list[int]]] = {
    "boxes": ("FP32", [-1, 4]),
    "labels": ("INT64", [-1]),
    "scores": ("FP32", [-1]),
    "image_index": ("INT32", [-1]),
    "masks": ("FP32", [-1, -1, -1]),
    "class_scores": ("FP32", [-1, -1]),
}
_STAGES = {"queue": "queue", "decode": "compute_input", "encode": "compute_output"}


@probes.get("")
async def show_server() -> Response:
    """The server's name, version and extensions of the protocol."""
    return json_response({"name": "roiserve", "version": version_of("roiserve"), "extensions": _EXTENSIONS})


@probes.get("/health/live")
async def live(state: State) -> Response:
    """Like `/healthz`."""
    await is_live(state)
    return json_response({"live": True})


@probes.get("/health/ready")
async def ready(state: State) -> Response:
    """Like `/readyz`."""
    await is_ready(state)
    return json_response({"ready": True})


# Must be declared before the routes of one model, to match first; hence no model can be called `stats`.
@models.get("/models/stats")
async def show_all_statistics(state: State) -> Response:
    """What all models have done since the start."""
    state.lifecycle.require_serving()
    return json_response({"model_stats": [_statistics(state, info) for info in state.models]})


@models.get("/models/{name}/versions/{version}")
@models.get("/models/{name}")
async def show_model(name: Name, state: State, version: str | None = None) -> Response:
    """A model's inputs and outputs."""
    info = _find(state, name, version)
    outputs = [{"name": one, "datatype": kind, "shape": shape} for one, (kind, shape) in _outputs_of(info).items()]
    inputs = [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    return json_response(
        {
            "name": info.name,
            "versions": [str(one.version) for one in state.models if one.name == info.name],
            "platform": _PLATFORM,
            "inputs": inputs,
            "outputs": outputs,
        }
    )


@models.get("/models/{name}/versions/{version}/ready")
@models.get("/models/{name}/ready")
async def show_model_ready(name: Name, state: State, version: str | None = None) -> Response:
    """Whether a model is loaded and a device is available to run it."""
    info = _find(state, name, version)
    await is_ready(state)
    return json_response({"name": info.name, "ready": True})


@models.get("/models/{name}/versions/{version}/config")
@models.get("/models/{name}/config")
async def show_config(name: Name, state: State, version: str | None = None) -> Response:
    """A model's inputs and outputs in the format of Triton's configuration, and its class names."""
    info = _find(state, name, version)
    kinds = {"FP32": "TYPE_FP32", "INT64": "TYPE_INT64", "INT32": "TYPE_INT32"}
    outputs = [{"name": one, "data_type": kinds[kind], "dims": dims} for one, (kind, dims) in _outputs_of(info).items()]
    parameters = {"labels": ",".join(info.labels)} | ({"mask_style": info.mask_style} if info.has_masks else {})
    return json_response(
        {
            "name": info.name,
            "platform": _PLATFORM,
            "max_batch_size": 0,
            "input": [{"name": "image", "data_type": "TYPE_STRING", "dims": [-1]}],
            "output": outputs,
            "parameters": {name: {"string_value": value} for name, value in parameters.items()},
        }
    )


@models.get("/models/{name}/versions/{version}/stats")
@models.get("/models/{name}/stats")
async def show_statistics(name: Name, state: State, version: str | None = None) -> Response:
    """What a model has done since the start."""
    return json_response({"model_stats": [_statistics(state, _find(state, name, version))]})


_INFER: dict[str, Any] = {
    "responses": describe_plain_errors(429, 504, 507),
    "openapi_extra": describe_json(InferRequest, **{"application/octet-stream": PICTURE_SCHEMA}),
}


@models.post("/models/{name}/versions/{version}/infer", **_INFER)
@models.post("/models/{name}/infer", **_INFER)
async def infer(name: Name, ask: Asked, version: str | None = None, header_length: HeaderLength = None) -> Response:
    """Find the objects in one image or several, and answer tensors: row i of `boxes`, `labels`, `scores` and `masks` is
    one object, in the image with the index `image_index[i]`, counted from 0.

    The images are the input `image`: encoded files as BYTES [n] (in JSON: in base64), or pixels as UINT8 [n, height,
    width, 3]. Each of the `masks` holds probabilities on a grid that spans its box. If one image fails, the whole
    request fails.
    """
    info = _find(ask.state, name, version)
    body = await ask.read()
    if len(body) <= _QUICK_BYTES:
        parsed = parse_request(body, header_length)
    else:
        parsed = await asyncio.to_thread(parse_request, body, header_length)
    return await _answer(ask, info, parsed)


async def _answer(ask: Ask, info: ModelInfo, parsed: ParsedRequest) -> Response:
    document = parsed.document
    asked = document.outputs or [Output(name=one) for one in _outputs_of(info) if one not in ALL_EXTRAS]
    _check_outputs(asked, info)
    with_masks = any(one.name == "masks" for one in asked)
    extras = ",".join(one.name for one in asked if one.name in ALL_EXTRAS)
    options = _options(document) | {"model": info.key, "masks": "rle" if with_masks else "none", "extras": extras}
    answers = [answer for answer, _ in await ask.answer(parsed.sources, ask.parameters(options), Tensors())]
    fields = {"model_name": info.name, "model_version": str(info.version)}
    if document.id is not None:
        fields["id"] = document.id

    def write() -> tuple[list[bytes], int | None]:
        arrays = _by_image([read_tensors(answer.encoded) for answer in answers])
        outputs = [(one.name, arrays[one.name], document.is_binary(one)) for one in asked]
        return write_answer(fields, outputs, max_json_bytes=ask.state.settings.max_answer_bytes)

    is_quick = sum(answer.num_bytes for answer in answers) <= _QUICK_BYTES
    pieces, json_bytes = write() if is_quick else await asyncio.to_thread(write)
    if json_bytes is None:
        return pieces_response(pieces)
    headers = {"Inference-Header-Content-Length": str(json_bytes)}
    return pieces_response(pieces, headers=headers, media_type="application/octet-stream")


def _check_outputs(asked: Sequence[Output], info: ModelInfo) -> None:
    names, known = [one.name for one in asked], _outputs_of(info)
    if unknown := [name for name in names if name not in known]:
        raise InvalidRequestError(f"{info.key} has no output {unknown[0][:100]!r}; it has: {', '.join(known)}")
    if len(set(names)) < len(names):
        raise InvalidRequestError("an output is asked for twice")
    if any("classification" in one.parameters or "shared_memory_region" in one.parameters for one in asked):
        raise InvalidRequestError("outputs come as tensors only: no classification and no shared memory")


def _options(document: InferRequest) -> dict[str, object]:
    """The options of `/v1/detect` among a request's parameters."""
    options = dict(document.parameters)
    for name in ("binary_data_output", "priority", "sequence_id", "sequence_start", "sequence_end"):
        options.pop(name, None)
    if microseconds := options.pop("timeout", None):
        if not isinstance(microseconds, int) or microseconds < 0:
            raise InvalidRequestError("parameter 'timeout': expected a whole number of microseconds")
        options["timeout_ms"] = math.ceil(microseconds / 1000)
    if wrong := options.keys() & {"model", "masks", "extras"}:
        raise InvalidRequestError(
            f"parameter {min(wrong)!r}: the path names the model; name the output 'masks' or 'class_scores' to get it"
        )
    return options


def _by_image(found: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, Sequence[NDArray[Any]]]:
    """The arrays of all images by name, and `image_index`."""
    counts = [len(arrays["boxes"]) for arrays in found]
    # The masks of images without detections may have a different size, so leave those out.
    filled = [arrays for arrays, count in zip(found, counts, strict=True) if count] or found[:1]
    by_image: dict[str, Sequence[NDArray[Any]]] = {name: [arrays[name] for arrays in filled] for name in found[0]}
    return by_image | {"image_index": [np.repeat(np.arange(len(found), dtype=np.int32), counts)]}


@models.post("/repository/index")
async def list_repository(state: State, ask: Asked) -> Response:
    """The loaded models."""
    await ask.read()
    return json_response(
        [{"name": one.name, "version": str(one.version), "state": "READY", "reason": ""} for one in state.models]
    )


@models.post(
    "/repository/models/{name}/load",
    dependencies=[Depends(require_admin_key)],
    responses=describe_plain_errors(409, 429),
)
async def load_model(name: Name, ask: Asked) -> Response:
    """Like `/v1/models/{name}/load`, with an administrator's key."""
    if b'"config"' in (body := await ask.read()) or b'"file:' in body:
        raise InvalidRequestError("models are loaded as the store has them, without a configuration or files")
    await ask.state.load_model(name)
    return json_response({})


@models.post(
    "/repository/models/{name}/unload",
    dependencies=[Depends(require_admin_key)],
    responses=describe_plain_errors(409),
)
async def unload_model(name: Name, ask: Asked) -> Response:
    """Like `/v1/models/{name}/unload`, with an administrator's key."""
    await ask.read()
    await ask.state.unload_model(name)
    return json_response({})


def _find(state: ApiState, name: str, version: str | None) -> ModelInfo:
    state.lifecycle.require_serving()
    return state.models.find(name if version is None else f"{name}@{version}")


def _outputs_of(info: ModelInfo) -> dict[str, tuple[str, list[int]]]:
    return {name: kind for name, kind in _OUTPUTS.items() if name != "masks" or info.has_masks}


def _statistics(state: ApiState, info: ModelInfo) -> dict[str, object]:
    """A model's figures, from the metrics: images by outcome, and seconds by stage (`compute_infer`: whole batches)."""
    outcomes = {
        sample.labels["outcome"]: int(sample.value)
        for metric in state.metrics.images.collect()
        for sample in metric.samples
        if sample.name.endswith("_total") and sample.labels["model"] == info.key
    }
    names = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    stats = {name: {"count": 0, "ns": 0} for name in names}
    for metric in state.metrics.stage_duration.collect():
        for sample in metric.samples:
            if sample.labels.get("model") == info.key and sample.name.endswith("_sum"):
                into = _STAGES.get(sample.labels["stage"], "compute_infer")
                stats[into]["ns"] += round(1e9 * sample.value)
    batches = sum(
        int(sample.value)
        for metric in state.metrics.batch_size.collect()
        for sample in metric.samples
        if sample.name.endswith("_count") and sample.labels["model"] == info.key
    )
    done = outcomes.pop("ok", 0)
    for name in names:
        stats[name]["count"] = done
    stats["fail"]["count"] = sum(outcomes.values())
    stats["compute_infer"]["count"] = batches
    stats["success"]["ns"] = sum(stats[name]["ns"] for name in names[2:])
    return {
        "name": info.name,
        "version": str(info.version),
        "last_inference": 0,
        "inference_count": done,
        "execution_count": batches,
        "inference_stats": stats,
        "batch_stats": [],
    }
