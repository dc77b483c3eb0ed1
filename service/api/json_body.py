"""Parses JSON bodies: one image in base64, and options. A body may be as large as its image, but everything beside the
image is bounded before anything is parsed, so that a document of many small values cannot take much time or memory.
"""

from __future__ import annotations

import base64
import binascii
import json
import reprlib
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from service.api.errors import MAX_MISTAKES, and_more, describe_option_errors
from service.errors import InvalidRequestError, TooLargeError, shown

M = TypeVar("M", bound=BaseModel)

MAX_JSON_BYTES = 256 * 1024
"""What a JSON body may hold beside its longest text, which is the image: more than 2000 proposals with all digits."""

MAX_JSON_VALUES = 256 * 1024
"""What a document of another protocol may hold: enough for a picture of 290 x 290 pixels as numbers."""

EXPECTED_JSON = 'a JSON object with the image in base64: {"image": "...", ...}'
# Base64 is decoded in pieces, since decoding holds the GIL, which the event loop needs, too. A multiple of 4.
_PIECE_BYTES = 1024 * 1024
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\r\n"
# The longest JSON escape: \u0041.
_ESCAPE_BYTES = 6
# The longest run of backslashes that is examined, in documents too large to parse before their image is cut out.
_MAX_BACKSLASHES = 64
# What other services call the image, with hints for our callers.
_OTHER_NAMES = {
    "images": "one image goes into 'image'; several go to /v1/detect/batch, as the files 'image' of a multipart form",
    "image_url": "addresses are not fetched; send the image's bytes in base64 as 'image'",
    "url": "addresses are not fetched; send the image's bytes in base64 as 'image'",
    "instances": "one image goes into 'image', beside its options",
    "inputs": "one image goes into 'image', beside its options",
    "data": "the image's bytes in base64 go into 'image'",
    "file": "the image's bytes in base64 go into 'image'",
}


def parse_json(data: bytes) -> tuple[bytes, dict[str, object]]:
    """Read a body of the form `{"image": "<base64>", ...}`.

    Returns:
        The encoded image and the other fields, with JSON's types.

    Raises:
        InvalidRequestError: the body does not have that form, or has a key twice.
        TooLargeError: it holds more than `MAX_JSON_BYTES` beside its longest text.
    """
    start, end = (0, 0) if len(data) <= MAX_JSON_BYTES else _longest_text(data)
    if (size := len(data) - (end - start)) > MAX_JSON_BYTES:
        raise _too_large(size)
    # The image is cut out, and an unguessable placeholder marks where it was.
    placeholder = uuid.uuid4().hex
    fields = _parse(data[:start] + placeholder.encode() + data[end:] if end else data)
    if placeholder in fields:
        raise InvalidRequestError(f"the JSON has a key of {end - start} bytes")
    if "image" not in fields:
        raise InvalidRequestError(f"expected {EXPECTED_JSON}; {_describe_keys(fields)}")
    image = fields.pop("image")
    if not isinstance(image, str):
        raise InvalidRequestError(f"'image': expected base64, got {shown(image)}")
    if not end:
        return decode_base64(image.encode(errors="replace")), fields
    if image != placeholder:
        raise _too_large(len(data) - len(image))
    return decode_base64(data[start:end]), fields


def parse_document(data: bytes, *, max_values: int = MAX_JSON_VALUES) -> dict[str, Any]:
    """Read a JSON object of another protocol, in which any number of texts may hold images.

    Raises:
        InvalidRequestError: it is not a JSON object.
        TooLargeError: it holds more than `max_values` values.
    """
    # Base64 has none of these. There are about as many commas as values, unless lists are nested without commas.
    if max(data.count(b","), data.count(b"[") + data.count(b"{")) > max_values:
        raise TooLargeError(
            f"the JSON has more than the {max_values} values that are read; send pictures as encoded files or as "
            "binary tensors"
        )
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidRequestError(f"expected a JSON object, got {shown(document)}")
    return document


def parse_model(kind: type[M], data: bytes, *, strict: bool = True, max_values: int = MAX_JSON_VALUES) -> M:
    """Read a JSON object of another protocol, and check its form.

    Args:
        strict: whether values must have their types as they are: no number for a text.
        max_values: see `parse_document`.

    Raises:
        InvalidRequestError: it is not a JSON object, or not one of this form.
        TooLargeError: see `parse_document`.
    """
    try:
        return kind.model_validate(parse_document(data, max_values=max_values), strict=strict)
    except ValidationError as error:
        raise InvalidRequestError(describe_option_errors(error.errors())) from None


def _too_large(size: int) -> TooLargeError:
    return TooLargeError(
        f"the JSON has {size} bytes beside its longest text, which should be the image; at most {MAX_JSON_BYTES} are "
        "read"
    )


def _longest_text(data: bytes) -> tuple[int, int]:
    """Start and end of the longest text between quotes, without them. Gives up as soon as the rest is too large."""
    longest = (0, 0)
    at = 0
    while (start := data.find(b'"', at) + 1) > 0:
        end = data.find(b'"', start)
        while end >= 0 and _is_escaped(data, end, start):
            # Base64 has no quotes, so a text with escaped quotes is not the image and counts like any other text.
            if end - longest[1] + longest[0] > MAX_JSON_BYTES:
                raise _too_large(end - longest[1] + longest[0])
            end = data.find(b'"', end + 1)
        if end < 0:
            break
        if end - start > longest[1] - longest[0]:
            longest = (start, end)
        at = end + 1
        if (size := at - longest[1] + longest[0]) > MAX_JSON_BYTES:
            raise _too_large(size)
    return longest


def _is_escaped(data: bytes, quote: int, start: int) -> bool:
    before = data[max(start, quote - _MAX_BACKSLASHES) : quote]
    backslashes = len(before) - len(before.rstrip(b"\\"))
    if backslashes == _MAX_BACKSLASHES:
        raise InvalidRequestError("a text of the JSON has a long run of backslashes")
    return backslashes % 2 == 1


def _parse(document: bytes) -> dict[str, object]:
    try:
        # Not strict: a shell's "$(base64 photo.jpg)" has line breaks, which strict JSON requires to be escaped.
        fields = json.loads(
            document.decode(), strict=False, object_pairs_hook=_no_key_twice, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise InvalidRequestError("the JSON is nested too deeply") from None
    except UnicodeDecodeError:
        raise InvalidRequestError("the body is not JSON: it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}") from None
    except ValueError:
        raise InvalidRequestError("a number of the JSON has thousands of digits") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"expected {EXPECTED_JSON}, got {shown(fields)}")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"the body is not JSON: {name} is no number there")


def _no_key_twice(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Refuse repeated keys: it is unclear which one the caller means, and the parser would keep the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        seen: set[str] = set()
        first = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidRequestError(
            f"the JSON has the key {reprlib.repr(first)} {keys.count(first)} times; expected each once"
        )
    return fields


def _describe_keys(fields: dict[str, object]) -> str:
    if not fields:
        return "got an empty one"
    for key in fields:
        if (hint := _OTHER_NAMES.get(key.lower())) is not None:
            return f"got {key!r}: {hint}"
    names = ", ".join([*(reprlib.repr(key) for key in list(fields)[:MAX_MISTAKES]), *and_more(len(fields))])
    return f"got the keys {names}"


def decode_base64(text: bytes) -> bytes:
    """Decode base64 in any common form: either alphabet, line breaks or none, with or without a `data:…;base64,` prefix
    or padding.

    Args:
        text: as written between the quotes of JSON, escapes included.

    Raises:
        InvalidRequestError: it is not base64; says what it looks like.
    """
    text = text[_prefix_length(text) :]
    decoded: list[bytes] = []
    rest = b""
    try:
        for piece in _unescaped(text):
            rest += piece.translate(_FROM_URL_SAFE, _WHITE_SPACE)
            whole = len(rest) // 4 * 4
            # The last characters are left for the next piece: they may be the end, where padding is allowed.
            whole = max(0, whole - 4)
            decoded.append(binascii.a2b_base64(rest[:whole], strict_mode=True) if whole else b"")
            if b"=" in rest[:whole]:
                raise binascii.Error("more follows the padding")
            rest = rest[whole:]
        padding = b"=" * (-len(rest) % 4) if b"=" not in rest else b""
        decoded.append(base64.b64decode(rest + padding, validate=True))
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(_describe_no_base64(text, str(error))) from None
    return b"".join(decoded)


def _prefix_length(text: bytes) -> int:
    """Length of a prefix such as `data:image/png;base64,`, which a browser's FileReader puts before the base64."""
    if text[:5].lower() != b"data:":
        return 0
    comma = text.find(b",", 0, 300)
    if comma < 0 or not text[:comma].replace(b"\\/", b"/").lower().endswith(b";base64"):
        raise InvalidRequestError("'image' is a data: URL, but not in base64; expected 'data:image/png;base64,...'")
    return comma + 1


def _unescaped(text: bytes) -> Iterator[bytes]:
    """A JSON text in pieces, unescaped: some writers escape each slash, and all must escape line breaks."""
    at = 0
    while at < len(text):
        piece = text[at : at + _PIECE_BYTES]
        if b"\\" in piece:
            if b"\\\\" in piece:
                raise ValueError("a backslash")
            # Do not cut an escape in two. There are no double backslashes here, so each backslash begins an escape.
            last = piece.rfind(b"\\")
            if last > len(piece) - _ESCAPE_BYTES and at + len(piece) < len(text):
                piece = piece[:last]
            yield orjson.loads(b'"%s"' % piece.translate(None, b"\r\n\t")).encode()
        else:
            yield piece
        at += len(piece)


def _describe_no_base64(text: bytes, why: str) -> str:
    beginning = text[:100].replace(b"\\/", b"/").decode(errors="replace")
    if beginning.lower().startswith(("http://", "https://", "s3://", "gs://", "file://", "ftp://")):
        return (
            f"'image' is an address, {reprlib.repr(beginning)}; addresses are not fetched, send the image's bytes in "
            "base64"
        )
    if len(text) < 1000 and "." in beginning[1:]:
        return f"'image' looks like a path, {reprlib.repr(beginning)}; send the file's bytes in base64"
    return f"'image' is not base64: {why[:1].lower()}{why[1:]}"
