"""The prediction routes of hosting platforms: KServe's and TF Serving's `:predict`, and Amazon SageMaker's `/ping` and
`/invocations`, which also takes what Google's Vertex AI sends. Detections are written as in `/v1/detect`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field

from service.api.ask import Ask, Asked
from service.api.auth import require_key
from service.api.health import ready
from service.api.json_body import decode_base64, parse_model
from service.api.models import Name
from service.api.openapi import PICTURE_SCHEMA, describe_json, describe_plain_errors
from service.api.options import DetectParameters, GivenOptions
from service.api.schemas import ImageDetections, detections_document, json_response
from service.api.state import State
from service.errors import InvalidRequestError, shown
from service.settings import Settings
from service.structures import Encoded, Json, MaskFormat

_EXPECTED = 'an image in base64: "…", {"b64": "…"} or {"image": "…"}'


class PredictRequest(BaseModel):
    """Images and the options of all of them."""

    instances: list[Any] = Field(
        description=f"Of each image, {_EXPECTED}.", min_length=1, max_length=1000, examples=[[{"b64": "..."}]]
    )
    parameters: GivenOptions | None = Field(None, description="The options of `/v1/detect`.")


class PredictAnswer(BaseModel):
    """What was found in each image, in order."""

    predictions: list[ImageDetections]


probes = APIRouter(tags=["hosting platforms"])
router = APIRouter(
    tags=["hosting platforms"],
    dependencies=[Depends(require_key)],
    responses=describe_plain_errors(401, 403, 404, 408, 413, 415, 422, 429, 503, 504, 507),
)


@probes.get("/ping", responses=describe_plain_errors(503))
async def ping(state: State) -> Response:
    """Like `/readyz`, for SageMaker."""
    return await ready(state)


@router.post("/v1/models/{name}:predict", response_model=PredictAnswer, openapi_extra=describe_json(PredictRequest))
async def predict(name: Name, ask: Asked) -> Response:
    """Find the objects in one image or several: KServe's protocol v1. If one image fails, the whole request fails."""
    images, options = await asyncio.to_thread(_parse, await ask.read())
    if "model" in options:
        raise InvalidRequestError("parameter 'model': the path names the model")
    return json_response({"predictions": await _find(ask, images, ask.parameters({**options, "model": name}))})


@router.post(
    "/invocations",
    response_model=ImageDetections | PredictAnswer,
    openapi_extra=describe_json(
        PredictRequest, **{"application/octet-stream": PICTURE_SCHEMA, "image/*": PICTURE_SCHEMA}
    ),
)
async def invoke(ask: Asked) -> Response:
    """Find the objects in the image that is the body, or in the images of a JSON object; the parameter `model` chooses
    the model.
    """
    body = await ask.read()
    if not body.lstrip().startswith(b"{"):
        [found] = await _find(ask, [body], DetectParameters())
        return json_response(found)
    images, options = await asyncio.to_thread(_parse, body)
    return json_response({"predictions": await _find(ask, images, ask.parameters(options))})


def further_routes(settings: Settings) -> APIRouter:
    """`/ping` and `/invocations` again, at the paths that the settings name; left out of the API description."""
    routes = APIRouter(include_in_schema=False)
    if settings.health_route is not None:
        routes.add_api_route(settings.health_route, ping, methods=["GET"])
    if settings.predict_route is not None:
        routes.add_api_route(settings.predict_route, invoke, methods=["POST"], dependencies=[Depends(require_key)])
    return routes


async def _find(ask: Ask, images: Sequence[bytes], parameters: DetectParameters) -> list[dict[str, object]]:
    info = ask.state.models.find(parameters.model)
    masks: MaskFormat = parameters.masks or ("rle" if info.has_masks else "none")
    answers = await ask.answer([Encoded(image) for image in images], parameters, Json(masks))
    return [detections_document(info, answer, progress, roi_op=parameters.roi_op) for answer, progress in answers]


def _parse(body: bytes) -> tuple[list[bytes], Mapping[str, object]]:
    document = parse_model(PredictRequest, body)
    return [_image(one, index) for index, one in enumerate(document.instances)], document.parameters or {}


def _image(instance: object, index: int) -> bytes:
    text = instance
    # Unwrap twice, for {"image": {"b64": "…"}}.
    for _ in range(2):
        if isinstance(text, dict) and len(text) == 1:
            text = text.get("image", text.get("b64"))
    if not isinstance(text, str):
        raise InvalidRequestError(f"instances[{index}]: expected {_EXPECTED}, got {shown(instance)}")
    try:
        return decode_base64(text.encode(errors="replace"))
    except InvalidRequestError as error:
        raise InvalidRequestError(f"instances[{index}]: {error}") from None
