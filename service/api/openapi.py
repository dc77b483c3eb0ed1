"""Adds to `/openapi.json` what FastAPI cannot derive: bodies that we read ourselves, errors as problem documents, and
examples of everything. Requests that Swagger UI prefills from it must work unchanged, so the options of a form are
described once, as query parameters.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

from service.api.errors import ERROR_STATUS, PROBLEM_MEDIA_TYPE
from service.api.keys import Keys
from service.api.options import BodyParameters, DetectParameters
from service.api.schemas import (
    BatchAnswer,
    DetectAnswer,
    Health,
    MessageProblem,
    ModelDescription,
    ModelList,
    PlainProblem,
    Problem,
)

_BINARY = {"type": "string", "format": "binary"}
PICTURE_SCHEMA = {"schema": _BINARY}
_REQUEST_ID = "0a42a7f79aa54d6daa3aa5de8c27c86d"
# A PNG of one colour, 32 x 32.
_TINY_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAK0lEQVR42u3NQQEAQAQAMC6XJHIKeCX4bQWWUx2XXhwTCAQCgUAgEAgEWz4wJQGKV9Ak"
    "OAAAAABJRU5ErkJggg=="
)
_DETECTIONS = {
    "model": "nuclei",
    "version": 1,
    "roi_op": "roi_align",
    "image": {"width": 256, "height": 256, "orientation_applied": False},
    "detections": [
        {
            "box": [76.891335, 188.5119, 96.35822, 208.12332],
            "label": "nucleus",
            "label_id": 1,
            "score": 0.999193,
            "mask": {"size": [256, 256], "counts": "R^c08f74M2N1O2N101O0000000001O001O1N2O2M2N3KnaW1"},
        }
    ],
    "timings_ms": {"decode": 1.868, "queue": 0.273, "inference": 221.56, "encode": 0.96, "total": 227.267},
    "batch_size": 1,
}
_MODEL = {
    "name": "nuclei",
    "version": 1,
    "default": True,
    "ready": True,
    "architecture": "mask_rcnn",
    "backbone": "resnet18",
    "roi_op": "roi_align",
    "roi_ops": ["roi_pool", "roi_align"],
    "labels": ["nucleus"],
    "score_thresh": 0.05,
    "max_detections": 400,
    "has_masks": True,
    "engine": "openvino",
    "precision": "float32",
    "device": "cpu",
    "mask_style": "torchvision",
}


def _problem_example(status: int) -> dict[str, object]:
    kind, title = next((kind, title) for kind, (of_status, title) in ERROR_STATUS.items() if of_status == status)
    example = {
        "type": f"urn:roiserve:error:{kind.code}",
        "title": title,
        "status": status,
        "detail": "what was expected, and what came",
        "code": kind.code,
        "request_id": _REQUEST_ID,
    }
    return example | ({"stage": "queue"} if status == 504 else {})


_EXAMPLES: dict[type[BaseModel], dict[str, object]] = {
    DetectAnswer: {"request_id": _REQUEST_ID, **_DETECTIONS},
    BatchAnswer: {"request_id": _REQUEST_ID, "results": [_DETECTIONS, {"error": _problem_example(415)}]},
    ModelDescription: _MODEL,
    ModelList: {"models": [_MODEL]},
    Health: {"status": "ready"},
}


def describe_answer(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for an answer of this shape, which we build ourselves."""
    return {200: {"model": model, "content": {"application/json": {"example": _EXAMPLES[model]}}}}


def describe_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for the errors of these statuses."""
    return {
        status: {
            "model": Problem,
            "description": " or ".join(title for of_status, title in ERROR_STATUS.values() if of_status == status),
            "content": {"application/json": {"example": _problem_example(status)}},
        }
        for status in statuses
    }


def describe_plain_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Like `describe_errors`, for protocols whose errors are `{"error": ...}`."""
    example = {"error": "what was expected, and what came", "code": "invalid_request", "request_id": _REQUEST_ID}
    return {
        status: {**one, "model": PlainProblem, "content": {"application/json": {"example": example}}}
        for status, one in describe_errors(*statuses).items()
    }


def describe_message_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Like `describe_errors`, for protocols whose errors are `{"message": ...}`."""
    example = {"message": "what was expected, and what came", "code": "invalid_request", "request_id": _REQUEST_ID}
    return {
        status: {**one, "model": MessageProblem, "content": {"application/json": {"example": example}}}
        for status, one in describe_errors(*statuses).items()
    }


def describe_json(model: type[BaseModel], **others: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's `openapi_extra` for a route that reads JSON of this shape itself.

    Args:
        others: what else it takes, by media type.
    """
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def inlined(value: Any) -> Any:
        if isinstance(value, list):
            return [inlined(one) for one in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return inlined(parts[value["$ref"].rpartition("/")[2]])
        return {key: inlined(one) for key, one in value.items()}

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined(schema)}, **others}}}


def describe_upload(
    parameters: type[DetectParameters], *kinds: Literal["multipart", "json", "raw"], several: bool = False
) -> dict[str, Any]:
    """FastAPI's `openapi_extra` for a route that takes images with these options.

    Args:
        several: whether the form may hold several images.
    """
    image: dict[str, Any] = {"type": "array", "items": _BINARY} if several else _BINARY
    proposals = BodyParameters.model_json_schema()["properties"]
    options = parameters.model_json_schema()["properties"] | proposals
    text = {"type": "string", "default": "", "description": f"{proposals['proposals']['description']} As JSON."}
    form = {"image": image} if several else {"image": image, "proposals": text}
    base64 = {"type": "string", "contentEncoding": "base64"}
    schemas: dict[str, dict[str, Any]] = {
        # The example is the content of an empty form. Without it Swagger UI believes that the form was filled in, and
        # keeps its content when the user switches from the form to JSON.
        "multipart": {
            "multipart/form-data": _upload_schema(form) | ({} if several else {"example": dict.fromkeys(form, "")})
        },
        "json": {"application/json": _upload_schema({"image": base64, **options}) | {"example": {"image": _TINY_PNG}}},
        "raw": {"application/octet-stream": PICTURE_SCHEMA, "image/*": PICTURE_SCHEMA},
    }
    content = {media_type: schema for kind in kinds for media_type, schema in schemas[kind].items()}
    return {"requestBody": {"required": True, "content": content}}


def _upload_schema(properties: dict[str, Any]) -> dict[str, Any]:
    return {"schema": {"type": "object", "required": ["image"], "properties": properties}}


def describe_app(app: FastAPI, keys: Keys) -> None:
    """Correct what FastAPI cannot be told: that errors have their own media type, and where keys are needed."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = describe()
            for path, route in document["paths"].items():
                for operation in route.values():
                    _correct_errors(operation)
                    if not (keys.are_needed or (keys.has_administrators and path.endswith("load"))):
                        operation.pop("security", None)
            if not (keys.are_needed or keys.has_administrators):
                document["components"].pop("securitySchemes", None)
        return describe()

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's documented way


def _correct_errors(operation: dict[str, Any]) -> None:
    for status, response in operation["responses"].items():
        schema = response.get("content", {}).get("application/json", {}).get("schema", {})
        if int(status) >= 400 and schema.get("$ref", "").endswith("/Problem"):
            response["content"] = {PROBLEM_MEDIA_TYPE: response["content"]["application/json"]}
