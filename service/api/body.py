"""Reads uploads (a raw image, a multipart form, or JSON with base64) into bytes and options. The byte limits, for one
body and for all requests together, are checked while a body streams in, so that they are never exceeded; so is a time
limit.
"""

from __future__ import annotations

import asyncio
import reprlib
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from service.api.errors import SlowBodyError, UnsupportedMediaTypeError
from service.api.json_body import parse_json
from service.api.multipart import FormReader
from service.batching.held_bytes import Holding
from service.errors import CancelledRequestError, InvalidRequestError, ServiceError, TooLargeError
from service.imaging.formats import sniff_format

_ACCEPTED = "a raw body of image/* or application/octet-stream, multipart/form-data, or application/json"
_FORM, _JSON = "multipart/form-data", "application/json"
# zlib's `wbits` for each Content-Encoding.
_UNPACKERS: Mapping[str, int | None] = {"": None, "identity": None, "gzip": 31, "deflate": 15}
# Larger JSON is parsed in a thread; smaller JSON is parsed faster than a thread starts.
_QUICK_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """What a body held.

    Attributes:
        images: encoded images, in order.
        file_names: of the images of a multipart form, in order; empty for other bodies.
        form: options of a multipart form, as text, in order.
        json: options of a JSON object, with JSON's types.
    """

    images: list[bytes]
    form: list[tuple[str, str]] = field(default_factory=list)
    json: dict[str, object] = field(default_factory=dict)
    file_names: list[str] = field(default_factory=list)


async def read_upload(request: Request, *, max_body_bytes: int, timeout_seconds: float, holding: Holding) -> Upload:
    """Read a request's body, whichever of the three kinds it is.

    Args:
        timeout_seconds: for the body to arrive; processing it does not count.
        holding: the request's account of bytes; grows as the body arrives.

    Raises:
        UnsupportedMediaTypeError: none of the three kinds; the message says what it looks like.
        TooLargeError: over the limit; nothing beyond it was held.
        OverloadedError: all requests together would hold too much.
        SlowBodyError: it took too long.
        InvalidRequestError: empty, or not the form or JSON that it claims to be.
        CancelledRequestError: the caller went away.
    """
    _refuse_encodings(request.headers)
    _refuse_repeated_content_type(request.headers)
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    async with _arriving(request, max_body_bytes, timeout_seconds, holding) as stream:
        if kind == _FORM:
            return await _read_form(content_type, _not_empty(stream))
        data = await _read_all(_not_empty(stream))
    if not _is_json(kind, data):
        return Upload([data])
    image, fields = parse_json(data) if len(data) <= _QUICK_BYTES else await asyncio.to_thread(parse_json, data)
    return Upload([image], json=fields)


async def read_data(request: Request, *, max_body_bytes: int, timeout_seconds: float, holding: Holding) -> bytes:
    """Read a request's body as it is, possibly empty; decompressed if its Content-Encoding is gzip or deflate.

    Arguments and errors are as in `read_upload`; the limits apply both to the received and to the decompressed bytes.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in _UNPACKERS:
        raise UnsupportedMediaTypeError(
            f"expected a body with Content-Encoding gzip, deflate or none, got {reprlib.repr(encoding)}"
        )
    async with _arriving(request, max_body_bytes, timeout_seconds, holding) as stream:
        data = await _read_all(stream)
    if (window_bits := _UNPACKERS[encoding]) is None:
        return data
    unpacked = await asyncio.to_thread(_unpack, data, window_bits, max_body_bytes)
    holding.add(len(unpacked))
    return unpacked


def _unpack(data: bytes, window_bits: int, max_bytes: int) -> bytes:
    unpacker = zlib.decompressobj(window_bits)
    try:
        unpacked = unpacker.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise InvalidRequestError(f"the body is not compressed as its Content-Encoding says: {error}") from None
    if len(unpacked) > max_bytes:
        raise TooLargeError(f"the unpacked body has more than the {max_bytes} bytes that are read")
    if not unpacker.eof or unpacker.unused_data:
        raise InvalidRequestError("the body is not compressed as its Content-Encoding says: it breaks off or goes on")
    return unpacked


@asynccontextmanager
async def _arriving(
    request: Request, max_body_bytes: int, timeout_seconds: float, holding: Holding
) -> AsyncIterator[AsyncGenerator[bytes, None]]:
    """The body's chunks, as they arrive within the limits of size and time."""
    _refuse_declared_length(request.headers, max_body_bytes, holding)
    try:
        async with asyncio.timeout(timeout_seconds), aclosing(_limited(request, max_body_bytes, holding)) as stream:
            yield stream
    except TimeoutError:
        raise SlowBodyError(f"the body was not complete after {timeout_seconds:g} seconds") from None
    except ClientDisconnect:
        raise CancelledRequestError("the caller went away while sending the body") from None


async def _not_empty(stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    is_empty = True
    async for chunk in stream:
        is_empty = is_empty and not chunk
        yield chunk
    if is_empty:
        raise InvalidRequestError(f"the body is empty; expected {_ACCEPTED}")


def _refuse_encodings(headers: Headers) -> None:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise UnsupportedMediaTypeError(f"expected a body without Content-Encoding, got {reprlib.repr(encoding)}")


def _refuse_repeated_content_type(headers: Headers) -> None:
    if len(headers.getlist("content-type")) > 1:
        raise InvalidRequestError("the header Content-Type is there twice; expected it once")


def _is_json(kind: str, data: bytes) -> bool:
    """Whether a body is JSON; if not, it is an image, or may be one, which decoding will show.

    Raises:
        UnsupportedMediaTypeError: it is neither.
    """
    image_format = _format_of(data)
    if kind == _JSON or kind.endswith("+json"):
        if image_format is not None:
            raise UnsupportedMediaTypeError(
                f"the body is a {image_format} image and no JSON; send it as Content-Type: application/octet-stream"
            )
        return True
    if image_format is not None:
        return False
    beginning = data[:300].lstrip()
    if beginning.startswith(b"--") and b"content-disposition" in beginning.lower():
        raise UnsupportedMediaTypeError(
            f"the body is a multipart form, but its Content-Type is {reprlib.repr(kind)}; let the library that writes "
            "the form set the header"
        )
    if kind.startswith("image/"):
        return False
    # JSON that curl -d and a browser's fetch send labelled as text or as another kind of form. No image begins so.
    if beginning.startswith(b"{"):
        return True
    if kind in ("", "application/octet-stream"):
        return False
    raise UnsupportedMediaTypeError(f"expected {_ACCEPTED}, got Content-Type {reprlib.repr(kind)}{_advice(beginning)}")


def _advice(beginning: bytes) -> str:
    if beginning.startswith((b"http://", b"https://")):
        return " and an address; addresses are not fetched, send the image itself"
    if beginning.startswith(b"image="):
        return " and a field 'image'; curl sends a file with -F image=@photo.jpg"
    return " and bytes that are neither an image that we read nor JSON (curl: -F image=@photo.jpg sends a file)"


def _format_of(data: bytes) -> str | None:
    try:
        return sniff_format(data[:32])
    except ServiceError:
        return None


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
        file_names=[part.file_name for part in parts if part.is_file],
    )
