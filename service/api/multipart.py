"""Multipart forms, collected in memory as they stream in. Called by `body.py`, which bounds their size. Starlette's own
form parser writes what is larger than a megabyte to files on disk, which we never want.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import InvalidRequestError

# Far more than any request of ours needs; each costs a little time even if it is empty.
_MAX_PARTS = 1000
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"')
_EXTENDED_FILENAME = re.compile(rb";\s*filename\*", re.IGNORECASE)


@dataclass(slots=True, eq=False)
class FormPart:
    """One part of a form.

    Attributes:
        is_file: whether it has a filename; else it is the value of a field.
    """

    name: str = ""
    is_file: bool = False
    data: bytearray = field(default_factory=bytearray)

    @property
    def text(self) -> str:
        """The value of a field.

        Raises:
            InvalidRequestError: it is not UTF-8.
        """
        return _decoded(self.data)


class FormReader:
    """Feed it the chunks of a body; `finish` gives the parts, in order.

    Args:
        content_type: the request's header, with the boundary.

    Raises:
        InvalidRequestError: from the constructor or any method, when this is no multipart form.
    """

    def __init__(self, content_type: str) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise InvalidRequestError("the body is not a multipart form: its Content-Type has no boundary")
        self._parts: list[FormPart] = []
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._is_complete = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_part_data": lambda data, start, end: self._parts[-1].data.extend(data[start:end]),
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

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._header_value))
            self._parts[-1].name = _decoded(options.get(b"name", b""))
            self._parts[-1].is_file = b"filename" in options or _has_extended_filename(bytes(self._header_value))
        self._header_name.clear()
        self._header_value.clear()

    def _complete(self) -> None:
        self._is_complete = True


def _has_extended_filename(disposition: bytes) -> bool:
    """Whether there is a `filename*`, as RFC 5987 writes what is not ASCII. RFC 7578 forbids it in forms, so the parser
    leaves it out; some clients send it all the same, and without a plain `filename` beside it.
    """
    return _EXTENDED_FILENAME.search(_QUOTED.sub(b'""', disposition)) is not None


def _decoded(data: bytes | bytearray) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError("the form's names and values are not all UTF-8") from None
