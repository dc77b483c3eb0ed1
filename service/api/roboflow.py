"""The routes of Roboflow's inference server that `inference_sdk` calls:
`InferenceHTTPClient(api_url="http://host:8000/roboflow")`.
"""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import Mapping
from importlib.metadata import version as version_of
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from service.api.ask import Ask, Asked
from service.api.auth import (
    Bearer,
    KeyHeader,
    KeyQuery,
    Password,
    require_admin_key_or_query,
    require_key_or_query,
)
from service.api.errors import describe_option_errors
from service.api.json_body import decode_base64, parse_document, parse_model
from service.api.openapi import PICTURE_SCHEMA, describe_json, describe_message_errors
from service.api.options import MAX_LABELS
from service.api.schemas import json_response
from service.api.state import ApiState, State
from service.errors import InvalidRequestError, ModelNotFoundError, ServiceError
from service.imaging.formats import sniff_format
from service.structures import Answer, Drawing, DrawnPart, Encoded, ModelInfo, Progress, Roboflow, RoboflowMasks

# A body up to this size is parsed faster than a thread starts.
_QUICK_BYTES = 16 * 1024
# What the client sends that changes nothing here: there is no such preprocessing, account or training.
_IGNORED = frozenset(
    {
        "active_learning_target_dataset",
        "allow_reduced_mask_resolution",
        "api_key",
        "countinference",
        "disable_active_learning",
        "disable_preproc_contrast",
        "disable_preproc_grayscale",
        "disable_preproc_static_crop",
        "fix_batch_size",
        "id",
        "image_type",
        "include_anomaly_map",
        "keypoint_confidence",
        "mask_decode_mode",
        "max_candidates",
        "model_type",
        "service_secret",
        "source",
        "source_info",
        "source_info_origin",
        "stroke",
        "tradeoff_factor",
        "visualization_labels",
        "visualization_stroke_width",
    }
)

_CONFIDENCE = "Keep what scores above this; unset, best or default: the model's threshold."

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
ModelId = Annotated[str, Field(max_length=200, description="`name`, or `name/version`.", examples=["nuclei/1"])]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class EncodedPicture(BaseModel):
    """An image in base64."""

    type: str = Field("base64", description="`base64`; addresses are not fetched.")
    value: str = Field(description="The image's bytes in base64.")


class _Options(BaseModel):
    model_config = ConfigDict(extra="allow")

    max_detections: int | None = Field(None, description="Keep at most so many, best first.")
    class_agnostic_nms: bool | None = Field(None, description="As in `/v1/detect`.")
    response_mask_format: Literal["polygon", "rle"] | None = Field(
        None, description="`rle` for exact masks; polygon or unset: the outline of each object's largest part."
    )
    disable_preproc_auto_orient: bool | None = Field(
        None, description="Only false: the EXIF orientation is always applied."
    )

    @field_validator("disable_preproc_auto_orient")
    @classmethod
    def _refuse_lying_pictures(cls, given: bool | None) -> bool | None:
        if given:
            raise PydanticCustomError("orientation", "Expected false or none, since EXIF orientation is always applied")
        return given

    def unknown(self) -> str | None:
        """The first option that is neither known nor one to ignore."""
        return next((name for name in self.model_extra or {} if name not in _IGNORED), None)


P = TypeVar("P", bound=_Options)


class InferRequest(_Options):
    """A request of the client's API v1. Options of Roboflow's own training and accounts are ignored."""

    model_id: ModelId
    image: EncodedPicture | Annotated[list[EncodedPicture], Field(min_length=1, max_length=1000)]
    confidence: Fraction | Literal["best", "default"] | None = Field(None, description=_CONFIDENCE)
    iou_threshold: Fraction | None = Field(None, description="`nms_thresh` of `/v1/detect`.")
    class_filter: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, max_length=MAX_LABELS, description="Keep only these labels."
    )
    visualize_predictions: bool | None = Field(None, description="Only false; for drawings see `/v1/annotate`.")

    @field_validator("visualize_predictions")
    @classmethod
    def _refuse_drawings(cls, given: bool | None) -> bool | None:
        if given:
            raise PydanticCustomError(
                "drawing", "Expected false or none; ask for a drawing by API v0 with format=image, or at /v1/annotate"
            )
        return given


class QueryOptions(_Options):
    """The query of the client's API v0. A confidence or an overlap of 1 and more is in percent."""

    confidence: Percent | Literal["best", "default"] | None = Field(None, description=_CONFIDENCE)
    overlap: Percent | None = Field(None, description="`nms_thresh` of `/v1/detect`.")
    classes: str | None = Field(None, description="Keep only these labels; commas between them.")
    format: Literal["json", "image"] | None = Field(None, description="image: the image with the detections drawn.")
    labels: bool | None = Field(None, description="Whether labels are drawn, too.")


class ModelRequest(BaseModel):
    """Which model."""

    model_id: ModelId


class RegisteredModel(BaseModel):
    """A loaded model."""

    model_id: str
    task_type: Literal["object-detection", "instance-segmentation"]


class RegisteredModels(BaseModel):
    """The loaded models: each as `name/version`, and the one of the highest version also as `name`."""

    models: list[RegisteredModel]


class ImageSize(BaseModel):
    """In pixels of the upright image."""

    width: int
    height: int


class Point(BaseModel):
    """A pixel of an outline, counted from 0."""

    x: int
    y: int


class RoboflowPrediction(BaseModel):
    """One object that was found."""

    x: float = Field(description="Of the box's centre, in pixels.")
    y: float
    width: float
    height: float
    confidence: float
    class_: str = Field(alias="class")
    class_id: int = Field(description="Counted from 0: the index among the model's labels.")
    points: list[Point] | None = Field(None, description="The outline of the mask's largest part.")
    rle: dict[str, Any] | None = Field(None, description="The mask as COCO's compressed run lengths.")


class InferAnswer(BaseModel):
    """What was found in an image."""

    inference_id: str
    time: float = Field(description="Seconds since the request came.")
    image: ImageSize
    predictions: list[RoboflowPrediction]


probes = APIRouter(prefix="/roboflow", tags=["roboflow"])
router = APIRouter(
    prefix="/roboflow",
    tags=["roboflow"],
    dependencies=[Depends(require_key_or_query)],
    responses=describe_message_errors(401, 403, 404, 408, 413, 415, 422, 429, 503, 504, 507),
)
_INFER: dict[str, Any] = {
    "response_model": InferAnswer | list[InferAnswer],
    "openapi_extra": describe_json(InferRequest),
}


@probes.get("/info")
async def show_server() -> Response:
    """The server's name and version."""
    identity = uuid.uuid5(uuid.NAMESPACE_DNS, socket.gethostname())
    return json_response({"name": "roiserve", "version": version_of("roiserve"), "uuid": str(identity)})


@router.get("/model/registry", response_model=RegisteredModels)
async def list_models(state: State) -> Response:
    """The loaded models."""
    state.lifecycle.require_serving()
    return json_response(_registry(state))


@router.post("/model/add", response_model=RegisteredModels, openapi_extra=describe_json(ModelRequest))
async def add_model(ask: Asked, bearer: Bearer, header: KeyHeader, password: Password, query: KeyQuery) -> Response:
    """Load a model of the store, which needs an administrator's key, or do nothing if it is loaded."""
    asked = parse_model(ModelRequest, await ask.read()).model_id
    try:
        ask.state.models.find(_reference(asked))
    except ModelNotFoundError:
        if not ask.state.keys.has_administrators:
            raise
        await require_admin_key_or_query(ask.state, bearer, header, password, query)
        await ask.state.load_model(_reference(asked))
    return json_response(_registry(ask.state, asked))


@router.post(
    "/model/remove",
    dependencies=[Depends(require_admin_key_or_query)],
    response_model=RegisteredModels,
    openapi_extra=describe_json(ModelRequest),
)
async def remove_model(ask: Asked) -> Response:
    """Unload a model, which needs an administrator's key."""
    await ask.state.unload_model(_reference(parse_model(ModelRequest, await ask.read()).model_id))
    return json_response(_registry(ask.state))


@router.post("/infer/object_detection", **_INFER)
async def detect_objects(ask: Asked) -> Response:
    """Find the objects in one image or several: boxes only. If one image fails, the whole request fails."""
    return await _infer(ask, with_masks=False)


@router.post("/infer/instance_segmentation", **_INFER)
async def segment_instances(ask: Asked) -> Response:
    """Find the objects in one image or several, with masks. If one image fails, the whole request fails."""
    return await _infer(ask, with_masks=True)


# Declared last: `model/add` would match, too.
@router.post(
    "/{project}/{version}",
    response_model=InferAnswer,
    responses={200: {"content": {"image/jpeg": PICTURE_SCHEMA}}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/x-www-form-urlencoded": {"schema": {"type": "string", "contentEncoding": "base64"}},
                "image/*": PICTURE_SCHEMA,
            },
        },
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in QueryOptions.model_json_schema()["properties"].items()
        ],
    },
)
async def infer_from_query(
    request: Request,
    ask: Asked,
    project: Annotated[str, Path(description="name of a model", examples=["nuclei"])],
    version: Annotated[str, Path(examples=["1"])],
) -> Response:
    """Find the objects in the image that is the body, in base64 or as it is: the client's API v0."""
    given = dict(request.query_params)
    if "image" in given:
        raise InvalidRequestError("option 'image': addresses are not fetched; send the image in base64 as the body")
    options = _validated(QueryOptions, {name: value for name, value in given.items() if value}, strict=False)
    info = ask.state.models.find(f"{project}@{version}")
    ask.require_place()
    body = await ask.read()
    image = Encoded(body if _is_picture(body) else await asyncio.to_thread(decode_base64, body))
    masks: RoboflowMasks = _masks(options) if info.has_masks else "none"
    chosen = {
        "model": info.key,
        "masks": "none" if masks == "none" else "rle",
        "score_thresh": _fraction(options.confidence),
        "nms_thresh": _fraction(options.overlap),
        "max_detections": options.max_detections,
        "class_agnostic_nms": options.class_agnostic_nms,
        "labels": options.classes or "",
    }
    parameters = ask.parameters({name: value for name, value in chosen.items() if value is not None})
    if options.format == "image":
        parts: tuple[DrawnPart, ...] = ("boxes", "masks", *(("labels", "scores") if options.labels else ()))
        [(answer, _)] = await ask.answer([image], parameters, Drawing("image/jpeg", parts))
        return Response(answer.encoded, media_type="image/jpeg")
    [(answer, progress)] = await ask.answer([image], parameters, Roboflow(masks))
    return json_response(_document(ask, answer, progress))


async def _infer(ask: Ask, *, with_masks: bool) -> Response:
    body = await ask.read()
    if len(body) <= _QUICK_BYTES:
        request, images = _parse(body)
    else:
        request, images = await asyncio.to_thread(_parse, body)
    chosen = {
        "model": _reference(request.model_id),
        "masks": "rle" if with_masks else "none",
        "score_thresh": request.confidence if isinstance(request.confidence, float) else None,
        "nms_thresh": request.iou_threshold,
        "max_detections": request.max_detections,
        "class_agnostic_nms": request.class_agnostic_nms,
        "labels": request.class_filter or None,
    }
    parameters = ask.parameters({name: value for name, value in chosen.items() if value is not None})
    form = Roboflow(_masks(request) if with_masks else "none")
    answers = await ask.answer([Encoded(image) for image in images], parameters, form)
    documents = [_document(ask, answer, progress) for answer, progress in answers]
    return json_response(documents if isinstance(request.image, list) else documents[0])


def _document(ask: Ask, answer: Answer, progress: Progress) -> dict[str, object]:
    """What was found in one image, as `InferAnswer` describes it, for `json_pieces`."""
    height, width = answer.image_size
    return {
        "inference_id": ask.record.request_id,
        "time": time.monotonic() - progress.started_at,
        "image": {"width": width, "height": height},
        "predictions": answer,
    }


def _parse(body: bytes) -> tuple[InferRequest, list[bytes]]:
    request = _validated(InferRequest, parse_document(body), strict=True)
    pictures = request.image if isinstance(request.image, list) else [request.image]
    for picture in pictures:
        if picture.type != "base64":
            raise InvalidRequestError(
                f"an image of type {picture.type[:50]!r}: expected 'base64'; addresses are not fetched, and NumPy's "
                "pickles are not opened"
            )
    return request, [decode_base64(picture.value.encode(errors="replace")) for picture in pictures]


def _validated(kind: type[P], given: Mapping[str, object], *, strict: bool) -> P:
    try:
        options = kind.model_validate(given, strict=strict)
    except ValidationError as error:
        raise InvalidRequestError(describe_option_errors(error.errors())) from None
    if (unknown := options.unknown()) is not None:
        known = ", ".join(name for name in kind.model_fields)
        raise InvalidRequestError(f"unknown option {unknown[:50]!r}; there are: {known}")
    return options


def _masks(options: _Options) -> RoboflowMasks:
    return "rle" if options.response_mask_format == "rle" else "points"


def _fraction(value: float | str | None) -> float | None:
    if not isinstance(value, float):
        return None
    return value / 100 if value >= 1 else value


def _is_picture(body: bytes) -> bool:
    try:
        sniff_format(body[:32])
    except ServiceError:
        return False
    return True


def _reference(model_id: str) -> str:
    """`name@version` for the client's `name/version`."""
    return model_id.replace("/", "@", 1)


def _registry(state: ApiState, asked: str | None = None) -> dict[str, object]:
    """The loaded models under all names that the client may use, and under the one it asked for."""
    by_id: dict[str, ModelInfo] = {f"{one.name}/{one.version}": one for one in state.models}
    names = [one.name for one in state.models] + ([] if asked is None else [asked])
    by_id |= {name: state.models.find(_reference(name)) for name in names}
    kinds = {True: "instance-segmentation", False: "object-detection"}
    return {"models": [{"model_id": name, "task_type": kinds[info.has_masks]} for name, info in by_id.items()]}
