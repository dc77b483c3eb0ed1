"""Every error of ours has its status, and the problem document says what RFC 9457 asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from service import errors
from service.api.errors import PROBLEM_MEDIA_TYPE, describe_option_errors, problem_response, status_of
from service.errors import DeadlineExceededError, NotReadyError, OverloadedError, ServiceError
from service.logs import request_id_context


def all_errors(kind: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from all_errors(child)


STATUSES = {
    "InvalidRequestError": 422,
    "UnsupportedImageError": 415,
    "InvalidImageError": 422,
    "TooLargeError": 413,
    "AnswerTooLargeError": 422,
    "PoisonousImageError": 422,
    "ModelNotFoundError": 404,
    "OverloadedError": 429,
    "QuotaError": 429,
    "NotReadyError": 503,
    "DeadlineExceededError": 504,
    "CancelledRequestError": 499,
    "InferenceError": 503,
    "OutOfMemoryError": 507,
    "ModelNeededError": 409,
    "ModelStoreError": 409,
    "DatasetError": 500,  # no request raises it
}


def test_every_error_has_the_status_of_the_table() -> None:
    arguments: dict[str, dict[str, Any]] = {
        "OverloadedError": {"retry_after_seconds": 1.0},
        "QuotaError": {"retry_after_seconds": 1.0},
        "DeadlineExceededError": {"stage": "queue"},
    }
    found = {kind.__name__: status_of(kind("why", **arguments.get(kind.__name__, {})))[0] for kind in all_errors()}
    assert found == STATUSES


def test_problem_document_has_the_members_of_rfc_9457() -> None:
    token = request_id_context.set("abc")
    response = problem_response(DeadlineExceededError("too late", stage="queue"))
    request_id_context.reset(token)
    assert (response.status_code, response.media_type) == (504, PROBLEM_MEDIA_TYPE)
    assert orjson.loads(response.body) == {
        "type": "urn:roiserve:error:deadline_exceeded",
        "title": "The deadline passed",
        "status": 504,
        "detail": "too late",
        "code": "deadline_exceeded",
        "request_id": "abc",
        "stage": "queue",
    }


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (OverloadedError("full", retry_after_seconds=2.1), "3"),
        (OverloadedError("full", retry_after_seconds=0.01), "1"),
        (NotReadyError("loading", retry_after_seconds=5), "5"),
    ],
)
def test_retry_after_is_in_whole_seconds_rounded_up(error: ServiceError, seconds: str) -> None:
    assert problem_response(error).headers["Retry-After"] == seconds


def test_long_input_is_not_echoed() -> None:
    found = describe_option_errors([{"loc": ("query", "labels"), "type": "x", "msg": "Bad", "input": "y" * 10_000}])
    assert found.startswith("option 'labels': bad, got 'yyy")
    assert len(found) < 100
