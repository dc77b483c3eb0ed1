"""What `/openapi.json` says beyond what FastAPI sees: bodies that we read ourselves, and errors as problem documents.
Used by the routes and by `app.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

from service.api.errors import ERROR_STATUS, PROBLEM_MEDIA_TYPE
from service.api.options import BodyParameters, DetectParameters
from service.api.schemas import Problem

_BINARY = {"type": "string", "format": "binary"}
PICTURE_SCHEMA = {"schema": _BINARY}


def describe_answer(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for an answer of this shape, which we build ourselves."""
    return {200: {"model": model}}


def describe_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for the errors of these statuses."""
    return {
        status: {
            "model": Problem,
            "description": " or ".join(title for of_status, title in ERROR_STATUS.values() if of_status == status),
        }
        for status in statuses
    }


def describe_upload(
    parameters: type[DetectParameters], *kinds: Literal["multipart", "json", "raw"], several: bool = False
) -> dict[str, Any]:
    """FastAPI's `openapi_extra` for a route that takes images with these options.

    Args:
        several: whether the form may hold several images.
    """
    options = parameters.model_json_schema()["properties"]
    if not several:
        options |= BodyParameters.model_json_schema()["properties"]
    image: dict[str, Any] = {"type": "array", "items": _BINARY} if several else _BINARY
    schemas: dict[str, dict[str, Any]] = {
        "multipart": {"multipart/form-data": _upload_schema(image, options)},
        "json": {"application/json": _upload_schema({"type": "string", "contentEncoding": "base64"}, options)},
        "raw": {"application/octet-stream": PICTURE_SCHEMA, "image/*": PICTURE_SCHEMA},
    }
    content = {media_type: schema for kind in kinds for media_type, schema in schemas[kind].items()}
    return {"requestBody": {"required": True, "content": content}}


def _upload_schema(image: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    return {"schema": {"type": "object", "required": ["image"], "properties": {"image": image, **options}}}


def describe_app(app: FastAPI) -> None:
    """Let errors be documented under the media type in which they are sent, which FastAPI cannot be told."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            for route in describe()["paths"].values():
                for operation in route.values():
                    for status, response in operation["responses"].items():
                        if int(status) >= 400:
                            response["content"] = {PROBLEM_MEDIA_TYPE: response["content"]["application/json"]}
        return describe()

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's documented way
