"""Parses multipart forms in memory as they stream in. Starlette's own form parser writes files larger than a megabyte
to disk, which we never want.
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass, field
from urllib.parse import unquote

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

from service.errors import InvalidRequestError, TooLargeError

# Far more than any request needs; each part costs a little time even if it is empty.
_MAX_PARTS = 1000
# Headers of all parts together: a browser sends about 100 bytes per part.
_MAX_HEADER_BYTES = 512 * 1024
# All fields that are not files: 2000 proposals, and more than all other options.
_MAX_FIELD_BYTES = 256 * 1024
# `; name=value` or `; name="value"`. Possessive, since with backtracking a long header would take quadratic time.
_PARAMETER = re.compile(rb'\s*+;\s*+([^\s=;"]++)\s*+=\s*+(?:"([^"\\]*+(?:\\.[^"\\]*+)*+)"|([^\s;"]*+))', re.DOTALL)
_ESCAPED = re.compile(rb'\\(["\\])')


@dataclass(slots=True, eq=False)
class FormPart:
    """One part of a form.

    Attributes:
        is_file: whether it has a filename; if not, it is the value of a field.
        file_name: the filename, without folders; empty if there is none.
    """

    name: str = ""
    is_file: bool = False
    file_name: str = ""
    data: bytearray = field(default_factory=bytearray)

    @property
    def text(self) -> str:
        """The value of a field.

        Raises:
            InvalidRequestError: it is not UTF-8.
        """
        return _decoded(self.data)


class FormReader:
    """Feed it the chunks of a body; `finish` returns the parts, in order.

    Args:
        content_type: the request's header, with the boundary.

    Raises:
        InvalidRequestError: from the constructor or any method, if this is not a multipart form.
    """

    def __init__(self, content_type: str) -> None:
        boundary = _parameters(content_type.encode("latin-1")).get(b"boundary")
        if not boundary:
            raise InvalidRequestError(
                "the body is not a multipart form: its Content-Type has no boundary; let the library that writes the "
                "form set the header"
            )
        self._parts: list[FormPart] = []
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._has_disposition = False
        self._header_bytes = 0
        self._field_bytes = 0
        self._is_complete = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_part_data": self._add_data,
                    "on_end": self._complete,
                },
            )
        except FormParserError as error:
            raise InvalidRequestError(f"the body is not a multipart form: {error}") from None

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequestError(f"the body is not a multipart form: {error}") from None

    def finish(self) -> list[FormPart]:
        """All parts."""
        if not self._is_complete:
            raise InvalidRequestError("the body is not a whole multipart form: it breaks off")
        if any(not part.name for part in self._parts):
            raise InvalidRequestError(
                "a part of the form has no name; expected 'Content-Disposition: form-data; name=\"...\"'"
            )
        return self._parts

    def _begin_part(self) -> None:
        if len(self._parts) == _MAX_PARTS:
            raise InvalidRequestError(f"the form has more than {_MAX_PARTS} parts")
        self._parts.append(FormPart())
        self._has_disposition = False

    def _end_header(self) -> None:
        self._header_bytes += len(self._header_name) + len(self._header_value)
        if self._header_bytes > _MAX_HEADER_BYTES:
            raise TooLargeError(f"the headers of the form's parts have more than {_MAX_HEADER_BYTES} bytes")
        if self._header_name.lower() == b"content-disposition":
            if self._has_disposition:
                raise InvalidRequestError("a part of the form has Content-Disposition twice; expected it once")
            self._has_disposition = True
            parameters = _parameters(bytes(self._header_value))
            self._parts[-1].name = _decoded(parameters.get(b"name", b""))
            # RFC 7578 forbids `filename*`, the form of RFC 5987, but some clients send it anyway, and nothing else.
            self._parts[-1].is_file = not parameters.keys().isdisjoint((b"filename", b"filename*"))
            self._parts[-1].file_name = _file_name(parameters)
        self._header_name.clear()
        self._header_value.clear()

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        part = self._parts[-1]
        if not part.is_file:
            self._field_bytes += end - start
            if self._field_bytes > _MAX_FIELD_BYTES:
                raise TooLargeError(f"the form's fields, without files, have more than {_MAX_FIELD_BYTES} bytes")
        part.data.extend(data[start:end])

    def _complete(self) -> None:
        self._is_complete = True


def _parameters(header: bytes) -> dict[bytes, bytes]:
    """The parameters that follow a header's first word, by name in lower case.

    Raises:
        InvalidRequestError: one comes twice, or something else follows; parsers would disagree on what is meant.
    """
    found: dict[bytes, bytes] = {}
    at = len(header) if b";" not in header else header.index(b";")
    while at < len(header):
        if (parameter := _PARAMETER.match(header, at)) is None:
            if header[at:].strip() in (b"", b";"):
                break
            raise InvalidRequestError(f"expected '; name=\"value\"' in a header, got {reprlib.repr(header[at:])}")
        name, quoted, plain = parameter.groups()
        if name.lower() in found:
            raise InvalidRequestError(f"a header has the parameter {_decoded(name)[:50]!r} twice; expected it once")
        found[name.lower()] = plain if quoted is None else _ESCAPED.sub(rb"\1", quoted)
        at = parameter.end()
    return found


def _file_name(parameters: dict[bytes, bytes]) -> str:
    name = parameters.get(b"filename", b"").decode(errors="replace")
    if not name:
        # RFC 5987: a character set, a language and the percent-encoded name.
        name = unquote(parameters.get(b"filename*", b"").decode(errors="replace").rpartition("'")[2])
    return re.split(r"[/\\]", name)[-1]


def _decoded(data: bytes | bytearray) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError("the form's names and values are not all UTF-8") from None
