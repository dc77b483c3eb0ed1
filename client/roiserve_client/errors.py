"""The errors of this package.

* RoIServeError
  - ProblemError            the server answered with an error; has its status, code, detail and request id
    - ServerDeadlineError   its deadline passed (504); also a DeadlineExceededError
  - DeadlineExceededError   the call's `timeout` passed without an answer
  - NoAnswerError           the connection broke before the answer was complete
    - UnreachableError      there was no connection at all
  - UnexpectedAnswerError   whoever answered is not a RoIServe server
  - ImageError              what was given as an image is none
  - ResultsFileError        a file of results does not fit what is to be done with it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class RoIServeError(Exception):
    """Base class of all errors of this package."""


class ProblemError(RoIServeError):
    """The server answered with an error.

    Args:
        status: the HTTP status.
        document: the answer, RFC 9457's `application/problem+json`.
        retry_after_seconds: from the header `Retry-After`, if there was one.

    Attributes:
        code: a stable word for programs, such as `invalid_image`; the server's `docs/http-api.md` lists them all.
        detail: what was expected and what came.
        title: the kind of error in a few words.
        request_id: by which the server's log knows the request.
        stage: where the request was when its deadline passed.
    """

    def __init__(self, status: int, document: Mapping[str, Any], retry_after_seconds: float | None = None) -> None:
        # All arguments, so that the error survives pickling on its way from a process pool.
        super().__init__(status, document, retry_after_seconds)
        self.status = status
        self.document = document
        self.retry_after_seconds = retry_after_seconds
        self.code = str(document.get("code", f"http_{status}"))
        self.title = str(document.get("title", ""))
        self.detail = str(document.get("detail", self.title))
        self.request_id: str | None = document.get("request_id")
        self.stage: str | None = document.get("stage")

    def __str__(self) -> str:
        request = f" (request {self.request_id})" if self.request_id else ""
        return f"{self.status} {self.code}: {self.detail}{request}"


class DeadlineExceededError(RoIServeError):
    """The time that the caller gave ran out."""


class ServerDeadlineError(ProblemError, DeadlineExceededError):
    """The time that the caller or the server gave ran out, and the server noticed it first."""


class NoAnswerError(RoIServeError):
    """The connection broke before the answer was complete."""


class UnreachableError(NoAnswerError):
    """There was no connection to the server."""


class UnexpectedAnswerError(RoIServeError):
    """An answer that is not RoIServe's: a proxy's page, perhaps, or the address of another server."""


class ImageError(RoIServeError, ValueError):
    """What was given as an image is none that can be sent."""


class ResultsFileError(RoIServeError, ValueError):
    """A file of results does not fit what is to be done with it."""


def problem_error(status: int, document: Mapping[str, Any], retry_after_seconds: float | None = None) -> ProblemError:
    """The exception for a problem document."""
    kind = ServerDeadlineError if document.get("code") == "deadline_exceeded" else ProblemError
    return kind(status, document, retry_after_seconds)
