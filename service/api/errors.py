"""The one table from error to HTTP status, and the forms in which errors are answered: RFC 9457 problem documents, or
plain ones for other protocols. Rooms below raise the errors of `service/errors.py` and know no statuses; errors that
only HTTP can raise are here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from service.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    InferenceError,
    InvalidRequestError,
    ModelNeededError,
    ModelNotFoundError,
    ModelStoreError,
    NotReadyError,
    OutOfMemoryError,
    OverloadedError,
    ServiceError,
    TooLargeError,
    UnsupportedImageError,
    shown,
)
from service.logs import request_id_context
from service.metrics import Metrics

logger = logging.getLogger(__name__)

PROBLEM_MEDIA_TYPE = "application/problem+json"


class RouteNotFoundError(InvalidRequestError):
    """There is nothing at this path."""

    code = "route_not_found"


class MethodNotAllowedError(InvalidRequestError):
    """There is something at this path, but not for this method."""

    code = "method_not_allowed"


class SlowBodyError(InvalidRequestError):
    """The request's body did not arrive in time."""

    code = "body_timeout"


class MalformedRequestError(InvalidRequestError):
    """The request is not valid HTTP/1.1, or proxies might read it differently than we do."""

    code = "malformed_request"


class SlowHeadError(InvalidRequestError):
    """The request's headers did not arrive in time."""

    code = "headers_timeout"


class HeadTooLargeError(InvalidRequestError):
    """The request line and the headers are too long, or too many."""

    code = "headers_too_large"


class UnsupportedTransferCodingError(InvalidRequestError):
    """The body comes in a transfer coding other than `chunked`."""

    code = "unsupported_transfer_coding"


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is of a kind that this route does not take."""

    code = "unsupported_media_type"


class ImageNotFetchedError(InvalidRequestError):
    """An image that a task names by its address could not be had."""

    code = "image_not_fetched"


class MissingKeyError(InvalidRequestError):
    """API keys are configured and the request has none."""

    code = "missing_key"


class KeyNotAllowedError(InvalidRequestError):
    """The request's API key may not do this."""

    code = "key_not_allowed"


# The most specific class counts. 499 is what proxies log for a caller that has gone; no caller receives it.
ERROR_STATUS: Mapping[type[ServiceError], tuple[int, str]] = {
    MalformedRequestError: (400, "Not a valid HTTP request"),
    MissingKeyError: (401, "An API key is needed"),
    KeyNotAllowedError: (403, "This API key is not allowed"),
    RouteNotFoundError: (404, "No such route"),
    ModelNotFoundError: (404, "No such model"),
    ModelNeededError: (409, "This model must stay"),
    ModelStoreError: (409, "The model cannot be loaded"),
    MethodNotAllowedError: (405, "Method not allowed"),
    SlowBodyError: (408, "The body came too slowly"),
    SlowHeadError: (408, "The headers came too slowly"),
    TooLargeError: (413, "Too large"),
    UnsupportedImageError: (415, "Not an image format that is read"),
    UnsupportedMediaTypeError: (415, "Not a kind of body that is read"),
    InvalidRequestError: (422, "The request cannot be accepted"),
    OverloadedError: (429, "Too many requests"),
    HeadTooLargeError: (431, "The headers are too large"),
    CancelledRequestError: (499, "The caller has gone"),
    ServiceError: (500, "An error of the service"),
    UnsupportedTransferCodingError: (501, "Not a transfer coding that is read"),
    NotReadyError: (503, "Not ready"),
    InferenceError: (503, "The model failed"),
    DeadlineExceededError: (504, "The deadline passed"),
    OutOfMemoryError: (507, "Not enough memory for this image"),
}

# In characters: however they are escaped, an answer stays below 8 KiB, and the names of COCO's 80 classes fit.
_MAX_DETAIL_LENGTH = 1200
# How many of a request's mistakes an answer lists.
MAX_MISTAKES = 3
# A failing probe is a valid answer, so it does not count as a rejected request.
_PROBES = ("/healthz", "/readyz")
# Protocols whose clients look for an error's text under the key `error`, and those that look under `message`.
_PLAIN_PREFIXES = ("/v2", "/hf/", "/label-studio/", "/api/function", "/invocations")
_PLAIN_SUFFIX = ":predict"
_MESSAGE_PREFIX = "/roboflow/"
# Errors that reject a request before any work is done on it.
_REFUSALS = (MissingKeyError, KeyNotAllowedError, SlowBodyError, TooLargeError, OverloadedError, NotReadyError)


def status_of(error: ServiceError) -> tuple[int, str]:
    """The HTTP status of an error and its title."""
    return next(ERROR_STATUS[kind] for kind in type(error).__mro__ if kind in ERROR_STATUS)


def detail_of(error: ServiceError) -> str:
    """The message of an error, for its answer and its log line: on one line, valid Unicode, and cut, since it may
    repeat what a caller sent.
    """
    # One character more, to tell whether the message was cut.
    text = str(error)[: _MAX_DETAIL_LENGTH + 1]
    if not text.isprintable():
        text = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    return text if len(text) <= _MAX_DETAIL_LENGTH else f"{text[:_MAX_DETAIL_LENGTH]}…"


def problem(error: ServiceError) -> dict[str, object]:
    """The RFC 9457 members of an error, as they go into JSON."""
    status, title = status_of(error)
    document: dict[str, object] = {
        "type": f"urn:roiserve:error:{error.code}",
        "title": title,
        "status": status,
        "detail": detail_of(error),
        "code": error.code,
        "request_id": request_id_context.get(),
    }
    if isinstance(error, DeadlineExceededError):
        document["stage"] = error.stage
    return document


def path_of(scope: Scope) -> str:
    """The requested path, without the prefix under which a proxy publishes the server."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def error_response(error: ServiceError, scope: Scope) -> Response:
    """The answer to a failed request, in the form of the protocol that its path belongs to."""
    path = path_of(scope)
    if path.startswith(_MESSAGE_PREFIX):
        key = "message"
    elif path.startswith(_PLAIN_PREFIXES) or path.endswith(_PLAIN_SUFFIX):
        key = "error"
    else:
        return problem_response(error)
    plain = {key: detail_of(error), "code": error.code, "request_id": request_id_context.get()}
    return Response(orjson.dumps(plain), status_of(error)[0], _headers(error), "application/json")


def problem_response(error: ServiceError) -> Response:
    """The answer to a failed request, as a problem document."""
    return Response(orjson.dumps(problem(error)), status_of(error)[0], _headers(error), PROBLEM_MEDIA_TYPE)


def _headers(error: ServiceError) -> dict[str, str]:
    headers = {}
    if isinstance(error, OverloadedError | NotReadyError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if isinstance(error, InferenceError) and not isinstance(error, OutOfMemoryError):
        headers["Retry-After"] = "1"
    if isinstance(error, MissingKeyError):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def report(error: ServiceError, metrics: Metrics) -> None:
    """Count a refusal; log errors that are not the caller's fault, with their traceback."""
    if isinstance(error, _REFUSALS):
        metrics.rejected.labels(error.code).inc()
    if isinstance(error, InferenceError) or status_of(error)[0] == HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("the service failed a request", exc_info=error)


def add_error_handlers(app: FastAPI, metrics: Metrics, *, paths: Sequence[str]) -> None:
    """Answer every error of a route in the form of its protocol.

    Args:
        paths: those to suggest when a request asks for an unknown one.
    """

    def answer(request: Request, error: ServiceError) -> Response:
        request.state.record.notes |= {"code": error.code, "detail": detail_of(error)}
        if request.url.path not in _PROBES:
            report(error, metrics)
        return error_response(error, request.scope)

    async def on_service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        return answer(request, error)

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(request, InvalidRequestError(describe_option_errors(error.errors())))

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "")
            response = answer(
                request, MethodNotAllowedError(f"{request.method} is not allowed here; allowed: {allowed}")
            )
            response.headers["Allow"] = allowed
            return response
        if error.status_code == HTTPStatus.NOT_FOUND:
            return answer(request, RouteNotFoundError(_describe_missing(request.url.path, paths)))
        return answer(request, ServiceError(str(error.detail)))

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)


def _describe_missing(path: str, known: Sequence[str]) -> str:
    """The message for an unknown path: the one that was probably meant, or all of them."""
    shown = path if len(path) <= 100 else f"{path[:100]}…"
    if similar := get_close_matches(path[:100].rstrip("/").lower(), known, n=1, cutoff=0.8):
        return f"nothing at {shown}; did you mean {similar[0]}?"
    return f"nothing at {shown}; there are: {', '.join(known)}"


def describe_option_errors(
    errors: Sequence[Mapping[str, Any]], *, names: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Describe the first options that pydantic refused: which they are, what was expected and what came.

    Args:
        names: what the caller calls an option, where that is not our name.
    """
    words = [_describe(error, names) for error in errors[:MAX_MISTAKES]]
    return "; ".join([*words, *and_more(len(errors))])


def and_more(count: int) -> list[str]:
    """What to add to a list of the first few of `count` mistakes."""
    return [f"and {count - MAX_MISTAKES} more"] if count > MAX_MISTAKES else []


def _describe(error: Mapping[str, Any], names: Mapping[str, str]) -> str:
    option = next(
        (part for part in error["loc"] if isinstance(part, str) and part not in ("query", "body", "path", "header")), ""
    )
    if error["type"] == "unknown_option":
        return str(error["msg"])
    return f"option {names.get(option, option)!r}: {describe_expectation(error)}"


def describe_expectation(error: Mapping[str, Any]) -> str:
    """What pydantic expected of a value and what came."""
    if error["type"] == "too_short":
        return f"expected at least {error['ctx']['min_length']} items, got {error['ctx']['actual_length']}"
    if error["type"] == "too_long":
        return f"expected at most {error['ctx']['max_length']} items, got {error['ctx']['actual_length']}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, got {_quote(error['input'])}"


def _quote(value: object) -> str:
    """The received value, as the caller wrote it; shortened, since it may be as long as a body."""
    return orjson.dumps(value).decode() if value is None or isinstance(value, bool) else shown(value)
