"""Calls of the server, without the connection: what to send, how to read the answer, and when to try again. `Client`
and `AsyncClient` carry out the same steps, each in its own way.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar

import httpx

from roiserve_client.answers import Answer, Model
from roiserve_client.errors import (
    DeadlineExceededError,
    NoAnswerError,
    ProblemError,
    RoIServeError,
    UnexpectedAnswerError,
    UnreachableError,
    problem_error,
)
from roiserve_client.images import ImageLike, name_of, read_image
from roiserve_client.options import split_options
from roiserve_client.version import __version__

T = TypeVar("T")

DEFAULT_TIMEOUT_SECONDS = 60.0
DEFAULT_RETRIES = 5
# Callers bound their own concurrency; waiting here for a place would be time that no server sees.
NO_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=64)
_RETRIED_STATUSES = (408, 429, 502, 503, 504)
# Another picture of the batch, or this one, breaks the model: once more is enough to know.
_RETRIED_ONCE = "inference_failed"
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 8.0
_CONNECT_SECONDS = 10.0
_LONGEST_TIMEOUT_MS = 3_600_000
# What the server gets of the time that is left, so that its own words about a deadline still arrive in time.
_SERVER_SHARE, _LARGEST_MARGIN_SECONDS = 0.95, 0.5

File = tuple[str, bytes, str]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that came: its status, headers and body, decompressed."""

    status: int
    headers: httpx.Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call of the server.

    Attributes:
        read: what the caller gets from a reply of status 200.
        files: the parts of a multipart form; none for a request without a body.
        has_deadline: whether the route takes `timeout_ms`.
    """

    method: str
    path: str
    read: Callable[[Reply], T]
    query: Mapping[str, str | list[str]] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[File] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    has_deadline: bool = True

    def request(self, http: httpx.Client | httpx.AsyncClient, seconds: float) -> httpx.Request:
        """The request for an attempt that may take so many seconds."""
        query = dict(self.query)
        if self.has_deadline:
            share = max(_SERVER_SHARE * seconds, seconds - _LARGEST_MARGIN_SECONDS)
            query["timeout_ms"] = str(max(1, int(min(1000 * share, _LONGEST_TIMEOUT_MS))))
        return http.build_request(
            self.method,
            self.path,
            params=query,
            data=self.fields or None,
            files=[("image", one) for one in self.files] or None,
            headers=self.headers,
            # A socket cannot wait for ever, as `inf` would have it.
            timeout=httpx.Timeout(min(seconds, _LONGEST_TIMEOUT_MS / 1000), connect=min(seconds, _CONNECT_SECONDS)),
        )


@dataclass(frozen=True, slots=True)
class Send:
    """A step: send the request, and return the reply or the error within so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Pause:
    """A step: wait."""

    seconds: float


Steps = Generator[Send | Pause, Reply | httpx.RequestError | TimeoutError | None, T]


def steps(call: Call[T], *, timeout_seconds: float, retries: int) -> Steps[T]:
    """The steps of a call until its answer: attempts, with pauses that grow and honour `Retry-After` between them.

    Raises:
        ProblemError: the server refused, and another attempt is pointless, one too many, or too late.
        DeadlineExceededError: the time ran out; its cause is the last attempt's error.
        NoAnswerError: the connection broke, at every attempt.
        UnexpectedAnswerError: the answer is not RoIServe's.
    """
    deadline = time.monotonic() + timeout_seconds
    attempt, failure = 0, None
    while (left := deadline - time.monotonic()) > 0:
        outcome = yield Send(left)
        try:
            return _read(call, outcome, timeout_seconds)
        except (ProblemError, NoAnswerError) as error:
            failure = error
        if not _is_retryable(failure, attempt, retries):
            raise failure
        seconds = pause_seconds(failure, attempt)
        if seconds >= (left := deadline - time.monotonic()):
            failure.add_note(f"not tried again: that would be in {seconds:.1f} s, and {max(left, 0):.1f} s are left")
            raise failure
        yield Pause(seconds)
        attempt += 1
    raise DeadlineExceededError(f"no answer within {timeout_seconds:g} s") from failure


def pause_seconds(failure: RoIServeError, attempt: int) -> float:
    """How long to wait before the attempt that follows.

    At least what the server asks for. The rest is by chance, lest all callers that were refused come back together.
    """
    asked = (failure.retry_after_seconds or 0.0) if isinstance(failure, ProblemError) else 0.0
    growing: float = min(_FIRST_PAUSE_SECONDS * 2**attempt, _LONGEST_PAUSE_SECONDS)
    return asked + growing * random.uniform(0.5, 1.0)


def _is_retryable(failure: RoIServeError, attempt: int, retries: int) -> bool:
    if attempt >= retries:
        return False
    if isinstance(failure, ProblemError):
        return failure.status in _RETRIED_STATUSES and not (failure.code == _RETRIED_ONCE and attempt)
    return True


def _read(call: Call[T], outcome: Reply | httpx.RequestError | TimeoutError | None, timeout_seconds: float) -> T:
    if isinstance(outcome, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError):
        raise UnreachableError(f"no connection to the server: {_words(outcome)}") from outcome
    # The time of a step is what is left of the call's, so this is the deadline.
    if isinstance(outcome, httpx.TimeoutException | TimeoutError):
        raise DeadlineExceededError(f"no answer within {timeout_seconds:g} s") from outcome
    if isinstance(outcome, Exception):
        raise NoAnswerError(f"the connection broke: {_words(outcome)}") from outcome
    assert outcome is not None
    if outcome.status >= 400:
        raise problem_error(outcome.status, _problem(outcome), _retry_after(outcome.headers))
    try:
        if outcome.status != 200:
            raise ValueError(f"status {outcome.status}")
        return call.read(outcome)
    except (KeyError, TypeError, ValueError) as error:
        kind = outcome.headers.get("content-type", "no content type")
        raise UnexpectedAnswerError(
            f"expected RoIServe's answer to {call.method} {call.path}, got {kind}: {outcome.body[:100]!r}"
        ) from error


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _problem(reply: Reply) -> Mapping[str, Any]:
    """The problem document; for the error page of a proxy, one that quotes it."""
    try:
        document = json.loads(reply.body)
    except ValueError:
        document = None
    if isinstance(document, dict) and "code" in document:
        return document
    return {"detail": reply.body[:300].decode("utf-8", "replace")}


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds, or a date, as RFC 9110 has it."""
    value = headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def detect_call(data: bytes, image: ImageLike, options: Mapping[str, Any], request_id: str | None) -> Call[Answer]:
    """The call of `/v1/detect`; `image` is what the bytes were read from."""
    query, fields = _query_and_fields(options)
    return Call(
        "POST", "/v1/detect", _read_answer, query, fields, [_file(data, image)], headers=_request_headers(request_id)
    )


def annotate_call(data: bytes, image: ImageLike, options: Mapping[str, Any], request_id: str | None) -> Call[bytes]:
    """The call of `/v1/annotate`."""
    query, fields = _query_and_fields(options)
    return Call(
        "POST", "/v1/annotate", _read_picture, query, fields, [_file(data, image)], _request_headers(request_id)
    )


def batch_call(
    images: Sequence[tuple[bytes, ImageLike]], options: Mapping[str, Any], request_id: str | None
) -> Call[list[Answer | ProblemError]]:
    """The call of `/v1/detect/batch`."""
    query, fields = _query_and_fields(options)
    files = [_file(data, image) for data, image in images]
    return Call("POST", "/v1/detect/batch", _read_batch, query, fields, files, _request_headers(request_id))


MODELS_CALL = Call(
    "GET",
    "/v1/models",
    lambda reply: [Model.from_json(one) for one in json.loads(reply.body)["models"]],
    has_deadline=False,
)


def read_images(images: Sequence[ImageLike]) -> list[tuple[bytes, ImageLike]]:
    """The bytes of each; errors as in `read_image`."""
    return [(read_image(image), image) for image in images]


def base_headers(api_key: str | None) -> dict[str, str]:
    """What every request carries.

    Raises:
        ValueError: a header cannot hold the key.
    """
    headers = {"User-Agent": f"roiserve-client/{__version__}"}
    if api_key is None:
        return headers
    if not _fits_header(api_key):
        raise ValueError("api_key: expected printable ASCII characters, without line breaks")
    return headers | {"Authorization": f"Bearer {api_key}"}


def checked_url(url: str) -> str:
    """The server's address.

    Raises:
        ValueError: not `http://…` or `https://…`.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"expected a URL such as http://127.0.0.1:8000, got {url!r}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"expected a URL such as http://127.0.0.1:8000, got {url!r}")
    return url


def checked_concurrency(number: int) -> int:
    """How many calls at a time; raises ValueError if there would be none."""
    if number < 1:
        raise ValueError(f"expected a concurrency of at least 1, got {number}")
    return number


def _query_and_fields(options: Mapping[str, Any]) -> tuple[Mapping[str, str | list[str]], Mapping[str, str]]:
    query, proposals = split_options(options)
    return query, {} if proposals is None else {"proposals": json.dumps(proposals)}


def _file(data: bytes, image: ImageLike) -> File:
    # In a form, whose parts are images and nothing else: a raw body that is no image might be read as JSON.
    return name_of(image), data, "application/octet-stream"


def _request_headers(request_id: str | None) -> Mapping[str, str]:
    if request_id is None:
        return {}
    if not _fits_header(request_id):
        raise ValueError(f"request_id: expected printable ASCII characters, got {request_id[:100]!r}")
    return {"X-Request-ID": request_id}


def _fits_header(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _read_answer(reply: Reply) -> Answer:
    return Answer.from_json(json.loads(reply.body))


def _read_picture(reply: Reply) -> bytes:
    if not reply.headers.get("content-type", "").startswith("image/"):
        raise ValueError("not a picture")
    return reply.body


def _read_batch(reply: Reply) -> list[Answer | ProblemError]:
    return [
        problem_error(one["error"]["status"], one["error"]) if "error" in one else Answer.from_json(one)
        for one in json.loads(reply.body)["results"]
    ]
