"""Uvicorn's HTTP/1.1 protocol with bounds. Plain uvicorn waits forever for the head of a request, buffers any amount of
it, answers malformed requests in plain text, and waits forever for a caller to read its answer. This file overrides
private parts of uvicorn; `pyproject.toml` therefore bounds its version, and a test checks that the parts exist.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import struct
import uuid
from http import HTTPStatus
from typing import NoReturn

import httptools
from fastapi import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.descriptors import is_spare
from service.api.errors import (
    HeadTooLargeError,
    MalformedRequestError,
    SlowHeadError,
    UnsupportedTransferCodingError,
    detail_of,
    problem_response,
)
from service.errors import NotReadyError, ServiceError
from service.logs import request_id_context

logger = logging.getLogger(__name__)

# Request line and headers. Even with cookies and tokens, browsers, proxies and tools send a few kilobytes.
_MAX_HEAD_BYTES = 64 * 1024
_MAX_HEADERS = 200
_HEAD_TIMEOUT_SECONDS = 10.0
# Requests that wait for the answer to the one before them; a single read may hold ten thousand.
_MAX_PIPELINED = 100
# What a chunked body may spend on sizes, extensions and trailers: this much plus an eighth of the body itself.
_MAX_FRAMING_BYTES = 64 * 1024
_BODY_BYTES_PER_FRAMING_BYTE = 8
# A caller must read at least so much of its answer in each period: far less than the slowest phone does.
_READER_PERIOD_SECONDS = 30.0
_LEAST_READ_BYTES = 64 * 1024
# RFC 3986's host and port; only the characters are checked.
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:%\[\]-]*")


class BoundedProtocol(HttpToolsProtocol):
    """One connection.

    * The head of a request is bounded in bytes, in headers, and in time since the connection became free for it.
    * A malformed request is answered with a problem document, after the answers to the requests before it.
    * `Upgrade` is ignored, as RFC 9110 allows: the request is served as HTTP/1.1.
    * Connections leave some descriptors free; excess connections are refused.
    * A caller that stops reading its answer is disconnected.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None
    # Whether the connection is between two requests or within a head; whether the head has begun; the bytes of reads
    # that held nothing but a part of it; and the number of complete heads.
    _awaits_head = True
    _head_has_begun = False
    _head_bytes = 0
    _heads = 0
    # Counts for the request that is being read.
    _parsed_bytes = 0
    _body_bytes = 0
    _framing_bytes = 0
    # The head of a request that asked for an upgrade, without its `Upgrade` header.
    _plain_head = b""
    # Why parsing was stopped, and the error to answer once the connection is free.
    _reason: ServiceError | None = None
    _refusal: ServiceError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Expect a request, unless the connection takes a descriptor that must stay free."""
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None and is_spare(connection.fileno()):
            self._refuse(NotReadyError("too many connections are open; try again"))
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        """Parse the received bytes."""
        self._unset_keepalive_if_required()
        if self._refusal is not None or self.transport.is_closing():
            return
        awaited_head, body_bytes, heads = self._awaits_head, self._body_bytes, self._heads
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The parser would drop the body. Feed a new one the head without `Upgrade`, then the rest of the data.
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
            self.data_received(self._plain_head + data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            self._refuse(self._reason or MalformedRequestError(f"expected a request in HTTP/1.1: {error}"))
            return
        # Not if a whole request came in this read: its body is not part of a head.
        if self._awaits_head and awaited_head and heads == self._heads:
            self._count_held_head(len(data))
        elif not self._awaits_head and not awaited_head:
            self._count_framing(len(data) - (self._body_bytes - body_bytes))
        if self._awaits_head and not self._is_busy:
            self._await_head()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head_has_begun = True
        self._parsed_bytes = self._body_bytes = self._framing_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A part of the request target has been parsed."""
        self._count_parsed(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header has been parsed, or a trailer of a chunked body, which is ignored."""
        self._count_parsed(len(name) + len(": \r\n") + len(value))
        if not self._head_has_begun:
            return
        super().on_header(name, value)
        if len(self.headers) > _MAX_HEADERS:
            self._stop(HeadTooLargeError(f"expected at most {_MAX_HEADERS} headers"))

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._stop_awaiting_head()
        self._heads += 1
        self._awaits_head = self._head_has_begun = False
        self._check_headers()
        if len(self.pipeline) == _MAX_PIPELINED:
            self._stop(MalformedRequestError(f"expected at most {_MAX_PIPELINED} requests ahead of their answers"))
        if self.parser.should_upgrade():
            self._plain_head = self._head_without_upgrade()
            return
        try:
            super().on_headers_complete()
        except (UnicodeDecodeError, httptools.HttpParserInvalidURLError):
            self._stop(MalformedRequestError("expected a path in ASCII, percent-encoded, as the request's target"))

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        if not self.parser.should_upgrade():
            super().on_message_complete()
        self._awaits_head = True

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_awaiting_head()
        self._stop_awaiting_reader()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The caller reads more slowly than we write."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """The caller has read nearly everything."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_awaiting_reader()

    def on_response_complete(self) -> None:
        """An answer has been written; the next request gets its turn."""
        super().on_response_complete()
        self._await_reader_of_the_rest()
        if self._is_busy or self.transport.is_closing():
            return
        if self._refusal is not None:
            self._answer(self._refusal)
        elif self._head_has_begun:
            self._await_head()

    def timeout_keep_alive_handler(self) -> None:
        """No further request came in time."""
        super().timeout_keep_alive_handler()
        self._await_reader_of_the_rest()

    def shutdown(self) -> None:
        """The server stops."""
        super().shutdown()
        self._await_reader_of_the_rest()

    @property
    def _is_busy(self) -> bool:
        """Whether a request is being answered, or waits to be."""
        cycle: RequestResponseCycle | None = self.cycle  # annotated as never None, but is before any request
        return cycle is not None and not cycle.response_complete

    def _check_headers(self) -> None:
        """Refuse what HTTP/1.1 forbids and proxies might read differently."""
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            self._stop(MalformedRequestError("CONNECT is for proxies, which this server is not"))
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and version != "1.0"):
            self._stop(MalformedRequestError(f"expected one Host header, got {len(hosts)}"))
        if hosts and not _HOST.fullmatch(hosts[0]):
            self._stop(MalformedRequestError("the Host header is not a host and port"))
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and codings != [b"chunked"]:
            self._stop(UnsupportedTransferCodingError("expected no Transfer-Encoding but 'chunked'"))

    def _head_without_upgrade(self) -> bytes:
        line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        headers = [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([line, *headers, b"", b""])

    def _count_parsed(self, size: int) -> None:
        self._parsed_bytes += size
        if self._parsed_bytes > _MAX_HEAD_BYTES:
            self._stop(_head_too_large())

    def _count_held_head(self, size: int) -> None:
        """Bound the head by received bytes too: the parser buffers a header and reports it only when it is complete."""
        self._head_bytes += size
        if self._head_bytes > _MAX_HEAD_BYTES:
            self._refuse(_head_too_large())

    def _count_framing(self, size: int) -> None:
        self._framing_bytes += size
        if self._framing_bytes > _MAX_FRAMING_BYTES + self._body_bytes // _BODY_BYTES_PER_FRAMING_BYTE:
            self._refuse(
                MalformedRequestError(
                    f"{self._framing_bytes} bytes of chunk sizes and extensions came for a body of {self._body_bytes} "
                    "bytes; send larger chunks"
                )
            )

    def _stop(self, reason: ServiceError) -> NoReturn:
        """Stop the parser from one of its callbacks. It then raises an error of its own, so ours is kept here."""
        self._reason = reason
        raise reason

    def _refuse(self, error: ServiceError) -> None:
        """Answer with an error and close the connection, once the requests that came before have their answers."""
        self._stop_awaiting_head()
        self._refusal = error
        cycle = self.cycle
        if self._is_busy and cycle.more_body and not self._head_has_begun:
            # The current request's body is malformed. If the request waits for its turn, so does this answer.
            place = next((index for index, (waiting, _) in enumerate(self.pipeline) if waiting is cycle), None)
            if place is not None:
                self.pipeline[place] = (cycle, self._last_response(error))  # type: ignore[assignment]  # an ASGI app
                return
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        elif self._is_busy:
            self.flow.pause_reading()
            return
        self._answer(error)

    def _answer(self, error: ServiceError) -> None:
        response = self._last_response(error)
        line = f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}\r\n".encode()
        headers = [*self.server_state.default_headers, *response.raw_headers]
        self.transport.write(
            b"".join([line, *(b"%s: %s\r\n" % header for header in headers), b"\r\n", bytes(response.body)])
        )
        self.transport.close()
        self._await_reader_of_the_rest()

    def _last_response(self, error: ServiceError) -> Response:
        """The answer after which the connection is closed. Logs it, too, since the app never sees such a request."""
        request_id = uuid.uuid4().hex
        token = request_id_context.set(request_id)
        response = problem_response(error)
        response.headers["X-Request-ID"] = request_id
        response.headers["Connection"] = "close"
        fields = {"client": self.client and self.client[0], "status": response.status_code, "code": error.code}
        logger.info("not a request", extra={"fields": {**fields, "detail": detail_of(error)}})
        request_id_context.reset(token)
        return response

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_SECONDS, self._end_wait_for_head)

    def _stop_awaiting_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_wait_for_head(self) -> None:
        self._stop_awaiting_head()
        if self._head_has_begun:
            self._refuse(SlowHeadError(f"the headers were not complete after {_HEAD_TIMEOUT_SECONDS:g} seconds"))
        else:
            self.transport.close()

    def _await_reader_of_the_rest(self) -> None:
        """After we closed the connection, watch that the caller reads the rest of the answer."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size() > 0:
            self._await_reader()

    def _await_reader(self) -> None:
        if self._reader_timer is None:
            size = self.transport.get_write_buffer_size()
            self._reader_timer = self.loop.call_later(_READER_PERIOD_SECONDS, self._look_at_reader, size)

    def _look_at_reader(self, size_before: int) -> None:
        """Close the connection if the caller reads too slowly. Nothing was written meanwhile, so whatever left the
        buffer has been read.
        """
        self._reader_timer = None
        if size_before - self.transport.get_write_buffer_size() < _LEAST_READ_BYTES:
            # With a reset; otherwise the kernel would keep the rest of the answer in memory.
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self._await_reader()

    def _stop_awaiting_reader(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None


def _head_too_large() -> HeadTooLargeError:
    return HeadTooLargeError(f"the request's headers exceed {_MAX_HEAD_BYTES} bytes")
