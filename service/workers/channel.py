"""The protocol between the process that serves HTTP and a worker: frames over one Unix stream socket. A frame is two
lengths (4 bytes each, little-endian), a header in JSON and a body of raw bytes. This module turns jobs, answers, models
and errors into headers and back; `process.py` says which frames there are. Nothing is pickled or shared in memory.

Deadlines need no translation: `time.monotonic` is one clock for all processes of a machine.
"""

from __future__ import annotations

import dataclasses
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, assert_never

import numpy as np
import orjson

from service import errors
from service.errors import ServiceError
from service.structures import (
    Coco,
    Cvat,
    DetectOptions,
    Drawing,
    Encoded,
    Form,
    HuggingFace,
    Json,
    LabelStudio,
    LabelStudioTag,
    ModelInfo,
    Pixels,
    Roboflow,
    Source,
    Tensors,
    Verification,
    VerifiedValue,
)

Header = dict[str, Any]
_LENGTHS = struct.Struct("<II")
_READ_BYTES = 1024 * 1024


def pack(header: Header, body: bytes = b"") -> list[bytes]:
    """A frame in two pieces, so that the body is not copied."""
    text = orjson.dumps(header)
    return [_LENGTHS.pack(len(text), len(body)) + text, body]


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # of the header with its lengths, then of the body
        self._length = 0  # of all pieces
        self._needed = _LENGTHS.size
        self._header: Header | None = None

    def feed(self, data: bytes) -> Iterator[tuple[Header, Sequence[bytes]]]:
        """The frames that these bytes complete, with the pieces in which their bodies came."""
        self._pieces.append(data)
        self._length += len(data)
        while self._length >= self._needed:
            if self._header is not None:
                body = self._take(self._needed)
                header, self._header, self._needed = self._header, None, _LENGTHS.size
                yield header, body
                continue
            header_length, body_length = _LENGTHS.unpack_from(self._together())
            if self._length >= _LENGTHS.size + header_length:
                self._header = orjson.loads(b"".join(self._take(_LENGTHS.size + header_length))[_LENGTHS.size :])
                self._needed = body_length
            else:
                self._needed = _LENGTHS.size + header_length

    def _take(self, length: int) -> Sequence[bytes]:
        """The first bytes, which end in the last piece."""
        last = self._pieces.pop()
        rest = self._length - length
        taken = [*self._pieces, last[: len(last) - rest]]
        self._pieces, self._length = [last[len(last) - rest :]], rest
        return taken

    def _together(self) -> bytes:
        self._pieces = [b"".join(self._pieces)]
        return self._pieces[0]


class BlockingChannel:
    """The worker's end. Any thread may send.

    Args:
        later: calls a function some milliseconds later.
    """

    def __init__(self, end: socket.socket, later: Callable[[Callable[[], None]], None]) -> None:
        self._socket = end
        self._later = later
        self._lock = threading.Lock()
        self._delayed: list[bytes] = []
        self._will_flush = False

    def send(self, header: Header, body: bytes = b"") -> None:
        """Send a frame. When this returns, it and all frames before it outlive this process.

        Raises:
            OSError: the other end is closed.
        """
        head, body = pack(header, body)
        with self._lock:
            head = b"".join([*self._delayed, head])
            self._delayed.clear()
            if len(body) < _READ_BYTES:
                self._socket.sendall(head + body)
            else:
                self._socket.sendall(head)
                self._socket.sendall(body)

    def send_soon(self, header: Header) -> None:
        """Send a frame along with the next one, or some milliseconds later. Sending releases Python's lock, and busy
        threads take long to get it back.
        """
        head, _ = pack(header)
        with self._lock:
            self._delayed.append(head)
            will_flush, self._will_flush = self._will_flush, True
        if not will_flush:
            self._later(self._flush)

    def _flush(self) -> None:
        with self._lock:
            self._will_flush = False
            if self._delayed:
                with suppress(OSError):  # the other end is closed, and `frames` has ended or is about to
                    self._socket.sendall(b"".join(self._delayed))
                self._delayed.clear()

    def frames(self) -> Iterator[tuple[Header, bytes]]:
        """The frames that the other end sends, until it is closed."""
        reader = FrameReader()
        while data := self._socket.recv(_READ_BYTES):
            for header, pieces in reader.feed(data):
                yield header, b"".join(pieces)


def options_from(fields: Header) -> DetectOptions:
    """Options from their form in a header."""
    label_ids, proposals = fields["label_ids"], fields["proposals"]
    return DetectOptions(
        **fields
        | {
            "label_ids": None if label_ids is None else frozenset(label_ids),
            "proposals": None if proposals is None else tuple(tuple(box) for box in proposals),
            "extras": tuple(fields["extras"]),
        }
    )


def options_to(options: DetectOptions) -> Header:
    """Options in the form they have in a header."""
    # Without `asdict`, which copies each number of the proposals.
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return values | {"label_ids": None if options.label_ids is None else sorted(options.label_ids)}


def source_to(source: Source) -> tuple[Header, bytes]:
    """An image in the form it has in a frame: its fields in the header, and the body."""
    match source:
        case Encoded():
            return {"intensity": source.intensity}, source.data
        case Pixels():
            return {"shape": source.array.shape}, source.array.tobytes()
        case _:
            assert_never(source)


def source_from(fields: Header, body: bytes) -> Source:
    """An image from its form in a frame."""
    if "shape" not in fields:
        return Encoded(body, fields["intensity"])
    # A copy that can be written: PyTorch warns about other arrays.
    return Pixels(np.frombuffer(bytearray(body), np.uint8).reshape(fields["shape"]))


# The answer forms, by their names in a header.
_FORMS: Mapping[str, type[Form]] = {
    "json": Json,
    "drawing": Drawing,
    "tensors": Tensors,
    "coco": Coco,
    "roboflow": Roboflow,
    "hugging_face": HuggingFace,
    "cvat": Cvat,
    "label_studio": LabelStudio,
}


def form_to(form: Form) -> Header:
    """An answer form as it is written in a header."""
    [name] = (name for name, kind in _FORMS.items() if isinstance(form, kind))
    return {"name": name, **dataclasses.asdict(form)}


def form_from(fields: Header) -> Form:
    """An answer form from its fields in a header."""
    values = {name: value for name, value in fields.items() if name != "name"}
    if "tags" in values:
        values["tags"] = tuple(LabelStudioTag(**tag | {"labels": tuple(tag["labels"])}) for tag in values["tags"])
    return _FORMS[fields["name"]](**values)


def model_info_from(fields: Header) -> ModelInfo:
    """A model from its fields in a header; `asdict` writes them."""
    verification = fields["verification"]
    return ModelInfo(
        **fields
        | {
            "labels": tuple(fields["labels"]),
            "roi_ops": tuple(fields["roi_ops"]),
            "verification": None if verification is None else _verification_from(verification),
        }
    )


def _verification_from(fields: Header) -> Verification:
    values = {name: VerifiedValue(**value) for name, value in fields["values"].items()}
    return Verification(**fields | {"values": values})


class WorkerTracebackError(Exception):
    """The traceback of an error in the worker: the `__cause__` of the same error raised in this process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def error_to(error: Exception) -> Header:
    """An error as it is written in a header; any that is not a `ServiceError` becomes an internal one."""
    is_ours = isinstance(error, ServiceError)
    return {
        "code": error.code if isinstance(error, ServiceError) else ServiceError.code,
        "message": str(error) if is_ours else f"an error of the service: {error!r}",
        "fields": {name: value for name, value in vars(error).items() if not name.startswith("__")} if is_ours else {},
        "traceback": None if is_ours and error.__cause__ is None else "".join(traceback.format_exception(error)),
    }


def error_from(header: Header) -> ServiceError:
    """The error that a header describes, with the same class, message and attributes."""
    kinds = (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServiceError))
    kind = next((kind for kind in kinds if kind.code == header["code"]), ServiceError)
    error = kind(header["message"], **header["fields"])
    if header["traceback"]:
        error.__cause__ = WorkerTracebackError(header["traceback"])
    return error
