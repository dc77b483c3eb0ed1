"""CVAT's automatic annotation: the part of Nuclio's dashboard that CVAT asks, so that CVAT lists every loaded model as
a function and runs it. The contract is that of `cvat/apps/lambda_manager/views.py` in CVAT's source.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Header, Path, Response
from pydantic import BaseModel, Field

from service.api.ask import Asked
from service.api.auth import require_key
from service.api.json_body import decode_base64, parse_model
from service.api.openapi import describe_json, describe_plain_errors
from service.api.schemas import json_response
from service.api.state import State
from service.errors import ModelNotFoundError
from service.structures import Cvat, Encoded, ModelInfo

_BOXES = ".boxes"


class Invocation(BaseModel):
    """What CVAT sends to a function; further fields are ignored."""

    image: str = Field(description="In base64.")
    threshold: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Keep what scores above this; unset, the model's."
    )


class Shape(BaseModel):
    """One object that was found."""

    confidence: float
    label: str
    type: str = Field(description="mask or rectangle.")
    points: list[float] = Field(description="x and y by turns: a box's two corners, or the outline of a mask.")
    mask: list[int] | None = Field(
        None,
        description="The pixels of a rectangle, 0 or 1, row by row, and then its first x, first y, last x and last y.",
    )


router = APIRouter(
    prefix="/api",
    tags=["cvat"],
    dependencies=[Depends(require_key)],
    responses=describe_plain_errors(401, 403, 404, 503),
)


@dataclass(frozen=True, slots=True)
class _Function:
    """A model, as CVAT sees it.

    Attributes:
        id: as in CVAT's addresses: letters, digits, dots, hyphens and underscores.
        with_masks: whether it finds masks, else rectangles.
    """

    id: str
    info: ModelInfo
    with_masks: bool

    def describe(self) -> dict[str, object]:
        """What CVAT reads of what Nuclio says of a function."""
        info, kind = self.info, "mask" if self.with_masks else "rectangle"
        # CVAT refuses functions that list a label twice.
        spec = [{"id": i, "name": name, "type": kind} for i, name in enumerate(dict.fromkeys(info.labels), start=1)]
        annotations = {
            "name": f"{info.name} {info.version} ({'masks' if self.with_masks else 'boxes'})",
            "type": "detector",
            "framework": "roiserve",
            "version": str(info.version),
            "spec": orjson.dumps(spec).decode(),
        }
        description = f"{info.architecture} with {info.backbone} and {info.roi_op}"
        return {
            "metadata": {"name": self.id, "namespace": "nuclio", "annotations": annotations},
            "spec": {"description": description},
            "status": {"state": "ready"},
        }


@router.get("/functions")
async def list_functions(state: State) -> Response:
    """The loaded models by the names of their functions: `nuclei`, and `nuclei.boxes` for the boxes of a model with
    masks; `nuclei.v1` is a lower version that is loaded as well.
    """
    return json_response({name: one.describe() for name, one in _functions(state).items()})


@router.get("/functions/{name}", responses=describe_plain_errors(422))
async def show_function(
    name: Annotated[str, Path(description="of a function", examples=["nuclei"])], state: State
) -> Response:
    """One function."""
    return json_response(_find(state, name).describe())


@router.post(
    "/function_invocations",
    response_model=list[Shape],
    openapi_extra=describe_json(Invocation),
    responses=describe_plain_errors(408, 413, 415, 422, 429, 504, 507),
)
async def invoke_function(
    ask: Asked,
    name: Annotated[str, Header(alias="x-nuclio-function-name", description="of a function", examples=["nuclei"])],
) -> Response:
    """Find the objects in one image."""
    function = _find(ask.state, name)
    ask.require_place()
    image, threshold = await asyncio.to_thread(_parse, await ask.read())
    masks = "rle" if function.with_masks else "none"
    parameters = ask.parameters({"model": function.info.key, "masks": masks, "score_thresh": threshold})
    [(answer, _)] = await ask.answer([Encoded(image)], parameters, Cvat(function.with_masks))
    return json_response(answer)


def _functions(state: State) -> Mapping[str, _Function]:
    state.lifecycle.require_serving()
    highest: dict[str, ModelInfo] = {}
    for info in state.models:
        highest[info.name] = max(info, highest.get(info.name, info), key=lambda one: one.version)
    names = [
        (info.name if highest[info.name] is info else f"{info.name}.v{info.version}", info) for info in state.models
    ]
    functions = {name: _Function(name, info, info.has_masks) for name, info in names}
    for name, info in names:
        if info.has_masks:
            functions.setdefault(name + _BOXES, _Function(name + _BOXES, info, with_masks=False))
    return functions


def _find(state: State, name: str) -> _Function:
    functions = _functions(state)
    if name not in functions:
        raise ModelNotFoundError(f"no function {name[:100]!r}; there are: {', '.join(functions)}")
    return functions[name]


def _parse(body: bytes) -> tuple[bytes, float | None]:
    # CVAT's users write 1 as well as 1.0.
    document = parse_model(Invocation, body, strict=False)
    return decode_base64(document.image.encode(errors="replace")), document.threshold
