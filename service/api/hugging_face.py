"""Hugging Face's tasks `object-detection` and `image-segmentation`, compatible with its Inference API and clients:
`InferenceClient(model="http://host:8000/hf/nuclei")`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Response
from pydantic import BaseModel, Field

from service.api.ask import Ask, Asked
from service.api.auth import require_key
from service.api.json_body import decode_base64, parse_model
from service.api.openapi import PICTURE_SCHEMA, describe_json, describe_plain_errors
from service.api.options import GivenOptions
from service.api.schemas import json_response
from service.errors import InvalidRequestError, shown
from service.structures import Encoded, HuggingFace

Name = Annotated[str, Path(description="name, or name@version", examples=["nuclei"])]

# Parameters that are accepted only with these values, which are what the server does anyway.
_FIXED: Mapping[str, object] = {"mask_threshold": 0.5, "subtask": "instance", "overlap_mask_area_threshold": None}


class TaskRequest(BaseModel):
    """A request in JSON; without parameters, the body may be the image itself."""

    inputs: str = Field(description="The image in base64.")
    parameters: GivenOptions | None = Field(
        None, description="`threshold`: keep what scores above this; and the options of `/v1/detect`."
    )


class PixelBox(BaseModel):
    """A box in whole pixels."""

    xmin: int
    ymin: int
    xmax: int
    ymax: int


class FoundObject(BaseModel):
    """One object that was found."""

    label: str
    score: float
    box: PixelBox
    mask: str | None = Field(None, description="A black and white PNG of the image's size, in base64.")


router = APIRouter(
    prefix="/hf",
    tags=["hugging face"],
    dependencies=[Depends(require_key)],
    responses=describe_plain_errors(401, 403, 404, 408, 413, 415, 422, 429, 503, 504, 507),
)
_TASK: dict[str, Any] = {
    "response_model": list[FoundObject],
    "openapi_extra": describe_json(
        TaskRequest, **{"application/octet-stream": PICTURE_SCHEMA, "image/*": PICTURE_SCHEMA}
    ),
}


@router.post("/{name}", **_TASK)
async def find(name: Name, ask: Asked) -> Response:
    """Find the objects in one image, for either task: with boxes and, if the model has them, masks."""
    has_masks = ask.state.models.find(name).has_masks
    return await _answer(ask, name, with_masks=has_masks)


@router.post("/{name}/object-detection", **_TASK)
async def detect_objects(name: Name, ask: Asked) -> Response:
    """Find the objects in one image: boxes only, which takes less time than masks."""
    return await _answer(ask, name, with_masks=False)


@router.post("/{name}/image-segmentation", **_TASK)
async def segment_image(name: Name, ask: Asked) -> Response:
    """Find the objects in one image, with masks: `subtask` is `instance`."""
    return await _answer(ask, name, with_masks=True)


async def _answer(ask: Ask, name: str, *, with_masks: bool) -> Response:
    ask.require_place()
    body = await ask.read()
    image, options = await asyncio.to_thread(_parse, body) if body.lstrip().startswith(b"{") else (body, {})
    chosen = options | {"model": name, "masks": "png" if with_masks else "none"}
    parameters = ask.parameters(chosen, names={"score_thresh": "threshold"} if "score_thresh" in options else {})
    [(answer, _)] = await ask.answer([Encoded(image)], parameters, HuggingFace(with_masks))
    return json_response(answer)


def _parse(body: bytes) -> tuple[bytes, dict[str, object]]:
    document = parse_model(TaskRequest, body)
    options = {name: value for name, value in (document.parameters or {}).items() if value is not None}
    for name, only in _FIXED.items():
        if (value := options.pop(name, only)) != only:
            raise InvalidRequestError(f"parameter {name!r}: expected {only!r} or none, got {shown(value)}")
    if wrong := options.keys() & {"model", "masks"}:
        raise InvalidRequestError(f"parameter {min(wrong)!r}: the path says that")
    if "threshold" in options:
        options["score_thresh"] = options.pop("threshold")
    return decode_base64(document.inputs.encode(errors="replace")), options
