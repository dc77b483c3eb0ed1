"""A lean HTTP/1.1 client: whole requests out, whole answers in, over keep-alive connections. A general-purpose client
would use more CPU than a fast server. No redirects, compression or proxies; a request is never sent twice.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlencode, urlsplit

import httptools

from service.errors import InvalidRequestError


class NoAnswerError(Exception):
    """A request got no answer.

    Attributes:
        reason: `refused` (no connection), `closed` (the server closed the connection before the answer was complete),
            `timeout`, or `garbled` (the answer was not HTTP).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed server URL.

    Attributes:
        address: host and port to connect to.
        host: value of the Host header.
        is_secure: whether to use TLS.
    """

    address: tuple[str, int]
    host: str
    is_secure: bool

    @classmethod
    def of_url(cls, url: str) -> Self:
        """The server of a URL.

        Raises:
            InvalidRequestError: not `http://…` or `https://…`.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = None if parts.netloc.endswith(":") else 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise InvalidRequestError(f"expected a URL such as http://127.0.0.1:8000, got {url!r}")
        is_secure = parts.scheme == "https"
        return cls((parts.hostname, port or (443 if is_secure else 80)), parts.netloc.rpartition("@")[2], is_secure)

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> bytes:
        """A whole request as sent over the wire."""
        target = f"{path}?{urlencode(query)}" if query else path
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self.host}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class Client:
    """Sends requests to one server. A connection carries one request at a time.

    Args:
        timeout_seconds: how long to wait for one answer, connecting included.
        max_connections: maximum number of open connections; further requests wait for one, and the waiting counts
            towards their time.
    """

    def __init__(self, target: Target, *, timeout_seconds: float = 60.0, max_connections: int = 1024) -> None:
        self._target = target
        self._timeout_seconds = timeout_seconds
        self._places = asyncio.Semaphore(max_connections)
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if target.is_secure else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for connection in self._idle:
            connection.close()

    async def send(self, request: bytes) -> Reply:
        """Send a request and wait for its answer.

        Raises:
            NoAnswerError: there was no complete answer.
        """
        async with self._places:
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    connection = self._idle_connection() or await self._connect()
                    return await self._exchange(connection, request)
            except TimeoutError:
                raise NoAnswerError("timeout") from None

    async def _exchange(self, connection: _Connection, request: bytes) -> Reply:
        try:
            reply = await connection.exchange(request)
        except BaseException:  # also when the caller gave up: a late answer would be taken for the next request's
            connection.close()
            raise
        if connection.is_usable:
            self._idle.append(connection)
        else:
            connection.close()
        return reply

    def _idle_connection(self) -> _Connection | None:
        while self._idle:
            if (connection := self._idle.pop()).is_usable:
                return connection
        return None

    async def _connect(self) -> _Connection:
        host, port = self._target.address
        try:
            _, connection = await asyncio.get_running_loop().create_connection(_Connection, host, port, ssl=self._tls)
        except OSError:
            raise NoAnswerError("refused") from None
        return connection


class _Connection(asyncio.Protocol):
    """One connection with at most one request in flight. The methods `on_…` are called by the parser."""

    def __init__(self) -> None:
        self.is_usable = False
        self._answer: asyncio.Future[Reply] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.is_usable = True

    async def exchange(self, request: bytes) -> Reply:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._chunks: list[bytes] = []
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        finally:
            self._answer = None

    def close(self) -> None:
        self.is_usable = False
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._answer is None:  # no request is in flight
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail("garbled")

    def eof_received(self) -> None:
        self.is_usable = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_usable = False
        self._fail("closed")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, chunk: bytes) -> None:
        self._chunks.append(chunk)

    def on_message_complete(self) -> None:
        if self._answer is not None and not self._answer.done():
            self.is_usable = self.is_usable and self._parser.should_keep_alive()
            self._answer.set_result(Reply(self._parser.get_status_code(), self._headers, b"".join(self._chunks)))

    def _fail(self, reason: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(NoAnswerError(reason))
