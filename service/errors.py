"""Every error that crosses a room boundary of the service. Code below `api/` raises these and knows no HTTP status;
`api/errors.py` holds the one table from error to status. Messages say what was expected and what came.

* ServiceError
  - InvalidRequestError       an option or a body that we cannot accept
    - UnsupportedImageError   not an image format that we read
    - InvalidImageError       the right format, but the bytes do not decode
    - TooLargeError           more bytes or pixels than the settings allow
    - AnswerTooLargeError     masks in a form that would take more bytes than the settings allow
    - PoisonousImageError     an image that twice stopped the process that worked on it
    - ModelNotFoundError      no model of that name or version
    - ModelNeededError        a model that must not be unloaded
  - OverloadedError           the queue is full; try again later
    - QuotaError              this caller's key has used up its share
  - NotReadyError             loading, draining, or the model is not loaded
  - DeadlineExceededError     no answer within the request's time
  - CancelledRequestError     the caller has gone and no longer waits for the answer
  - InferenceError            the model failed on the batch that this image was in
    - OutOfMemoryError        for lack of memory; in the end, for this image alone
  - ModelStoreError           a model folder, its `model.toml` or its weights are invalid
  - DatasetError              a data set that cannot be trained on or evaluated
"""

from __future__ import annotations

import reprlib
from itertools import islice


class ServiceError(Exception):
    """Base of all errors of this package. `code` is a stable machine-readable word for clients."""

    code = "internal_error"


class InvalidRequestError(ServiceError):
    """The request cannot be accepted as it stands."""

    code = "invalid_request"


class UnsupportedImageError(InvalidRequestError):
    """The bytes are not in an image format that we read."""

    code = "unsupported_image"


class InvalidImageError(InvalidRequestError):
    """The bytes begin like an image that we read, but do not decode."""

    code = "invalid_image"


class TooLargeError(InvalidRequestError):
    """More bytes or pixels than the settings allow; noticed before the work is done."""

    code = "too_large"


class AnswerTooLargeError(InvalidRequestError):
    """In the form that was asked for, the answer would take more bytes than the settings allow."""

    code = "answer_too_large"


class PoisonousImageError(InvalidRequestError):
    """The process that worked on this image, and on nothing else, died twice."""

    code = "poisonous_image"


class ModelNotFoundError(InvalidRequestError):
    """No model of that name or version is known."""

    code = "model_not_found"


class ModelNeededError(InvalidRequestError):
    """The model must stay: requests that name no model go to it."""

    code = "model_needed"


class OverloadedError(ServiceError):
    """The queue is full.

    Attributes:
        retry_after_seconds: after how long a retry is likely to be accepted.
    """

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class QuotaError(OverloadedError):
    """This caller's key has used up its share; others have not."""

    code = "quota_exceeded"


class NotReadyError(ServiceError):
    """The service is loading, draining, or does not serve this model at the moment.

    Attributes:
        retry_after_seconds: after how long a retry may succeed.
    """

    code = "not_ready"

    def __init__(self, message: str, *, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineExceededError(ServiceError):
    """The request's deadline has passed.

    Attributes:
        stage: the stage it was in at that time (`decode`, `queue`, `inference`, `encode`).
    """

    code = "deadline_exceeded"

    def __init__(self, message: str, *, stage: str) -> None:
        super().__init__(message)
        self.stage = stage


class CancelledRequestError(ServiceError):
    """The caller has gone, so the work was not done."""

    code = "cancelled"


class InferenceError(ServiceError):
    """The model failed on the batch that this image was in."""

    code = "inference_failed"


class OutOfMemoryError(InferenceError):
    """The device did not have enough memory for the batch that this image was in."""

    code = "insufficient_memory"


class ModelStoreError(ServiceError):
    """A model folder, its `model.toml` or its weights are invalid."""

    code = "model_store_error"


class DatasetError(ServiceError):
    """A data set that cannot be trained on or evaluated; the message lists every problem."""

    code = "dataset_error"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to 200 characters: libraries append their C++ stack traces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}…"


_LONGEST_LINE = 200


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3

    def repr_dict(self, x: dict[object, object], level: int) -> str:
        # reprlib would sort all the keys, to show four of them.
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)


shown = _Shown().repr
"""The beginning of a value that came in JSON, for a message: however long, wide or deep it is, that costs nothing."""
