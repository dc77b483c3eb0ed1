"""Reading uploads: a raw image, a multipart form or JSON with base64, into bytes and options. Called by the routes that
take images. The byte limits, of one body and of all requests together, hold while a body streams in, so that too much
is never held; so does a time limit.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import reprlib
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import orjson
from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from service.api.errors import SlowBodyError
from service.api.multipart import FormReader
from service.batching.held_bytes import Holding
from service.errors import CancelledRequestError, InvalidRequestError, TooLargeError, UnsupportedImageError

_ACCEPTED = "a raw body of image/* or application/octet-stream, multipart/form-data, or application/json"
# Longer than any key that means something: such a text stands where a value is.
_LONGER_THAN_KEYS = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """What a body held.

    Attributes:
        images: encoded images, in order.
        form: options of a multipart form, as text, in order.
        json: options of a JSON object, with JSON's types.
    """

    images: list[bytes]
    form: list[tuple[str, str]] = field(default_factory=list)
    json: dict[str, object] = field(default_factory=dict)


async def read_upload(request: Request, *, max_body_bytes: int, timeout_seconds: float, holding: Holding) -> Upload:
    """Read a request's body, whichever of the three kinds it is.

    Args:
        holding: the request's account of bytes; grows as the body arrives.

    Raises:
        UnsupportedImageError: none of the three kinds; the message lists them.
        TooLargeError: over the limit; nothing beyond it was held.
        OverloadedError: all requests together would hold too much.
        SlowBodyError: it took too long.
        InvalidRequestError: empty, or not the form or JSON that it says it is.
        CancelledRequestError: the caller went away.
    """
    if encoding := request.headers.get("content-encoding"):
        raise UnsupportedImageError(f"expected a body without Content-Encoding, got {encoding!r}")
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    _refuse_declared_length(request.headers, max_body_bytes, holding)
    try:
        async with asyncio.timeout(timeout_seconds), aclosing(_limited(request, max_body_bytes, holding)) as stream:
            if content_type == "multipart/form-data":
                return await _read_form(request.headers["content-type"], stream)
            if content_type == "application/json":
                # In a thread: tens of megabytes of text would hold up the event loop.
                return await asyncio.to_thread(_parse_json, await _read_all(stream))
            if content_type.startswith("image/") or content_type in ("", "application/octet-stream"):
                return Upload([await _read_all(stream)])
    except TimeoutError:
        raise SlowBodyError(f"the body was not complete after {timeout_seconds:g} seconds") from None
    except ClientDisconnect:
        raise CancelledRequestError("the caller went away while sending the body") from None
    raise UnsupportedImageError(
        f"expected {_ACCEPTED}, got Content-Type {content_type!r} (curl: add -H 'Content-Type: image/jpeg')"
    )


def _refuse_declared_length(headers: Headers, max_body_bytes: int, holding: Holding) -> None:
    declared = headers.get("content-length", "0")
    if not declared.isdecimal():
        return
    if int(declared) > max_body_bytes:
        raise TooLargeError(f"the body has {declared} bytes, at most {max_body_bytes} are read")
    holding.expect(int(declared))


async def _limited(request: Request, max_body_bytes: int, holding: Holding) -> AsyncGenerator[bytes, None]:
    received_bytes = 0
    async for chunk in request.stream():
        received_bytes += len(chunk)
        if received_bytes > max_body_bytes:
            raise TooLargeError(f"the body has more than the {max_body_bytes} bytes that are read")
        holding.add(len(chunk))
        yield chunk
    if received_bytes == 0:
        raise InvalidRequestError(f"the body is empty; expected {_ACCEPTED}")


async def _read_all(stream: AsyncGenerator[bytes, None]) -> bytes:
    return b"".join([chunk async for chunk in stream])


async def _read_form(content_type: str, stream: AsyncGenerator[bytes, None]) -> Upload:
    reader = FormReader(content_type)
    async for chunk in stream:
        reader.feed(chunk)
    parts = reader.finish()
    for part in parts:
        if part.name == "image" and not part.is_file:
            raise InvalidRequestError(
                "the field 'image' came without a filename; send a file (curl: -F image=@photo.jpg)"
            )
        if part.is_file and part.name != "image":
            raise InvalidRequestError(f"a file came in the field {reprlib.repr(part.name)}; files go into 'image'")
    return Upload(
        [bytes(part.data) for part in parts if part.is_file],
        form=[(part.name, part.text) for part in parts if not part.is_file],
    )


def _parse_json(data: bytes) -> Upload:
    try:
        fields = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
        raise InvalidRequestError('expected a JSON object with the image in base64: {"image": "...", ...}')
    _refuse_repeated_keys(data, fields["image"])
    try:
        image = base64.b64decode(fields.pop("image"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(f"'image' is not base64 (standard alphabet, no line breaks): {error}") from None
    return Upload([image], json=fields)


def _refuse_repeated_keys(data: bytes, image: str) -> None:
    """Which of two equal keys a caller means, nobody knows; orjson would keep the last.

    Args:
        data: JSON that orjson has read.
        image: its longest text, which is left out of the second reading: that takes far longer than the first.
    """
    if len(image) > _LONGER_THAN_KEYS:
        data = data.replace(image.encode(), b"", 1)
    try:
        json.loads(data.decode(), object_pairs_hook=_refuse_repetition)
    except RecursionError:
        raise InvalidRequestError("the JSON is nested too deeply") from None


def _refuse_repetition(pairs: Sequence[tuple[str, object]]) -> None:
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise InvalidRequestError(f"the JSON has the key {reprlib.repr(key)} {count} times; expected each once")
