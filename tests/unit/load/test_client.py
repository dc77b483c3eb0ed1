"""The client against servers that answer with bytes of our own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from service.errors import InvalidRequestError
from service.load.client import Client, NoAnswerError, Target

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HELLO = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[Target]:
    async def serve_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    async with await asyncio.start_server(serve_and_close, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield Target.of_url(f"http://{host}:{port}/ignored")


class Answering:
    """Answers each request with the same bytes, in pieces; counts connections and keeps what came."""

    def __init__(self, *pieces: bytes) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self._pieces = pieces

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            [length] = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")]
            self.requests.append(head + await reader.readexactly(length))
            for piece in self._pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)


async def test_requests_and_answers_arrive_whole_over_one_connection() -> None:
    server = Answering(HELLO[:20], HELLO[20:50], HELLO[50:])
    body = bytes(range(256)) * 4000
    async with serving(server) as target, Client(target) as client:
        request = target.request(
            "POST", "/v1/detect", query={"masks": "none", "x": "a b"}, headers={"A": "b"}, body=body
        )
        replies = [await client.send(request) for _ in range(3)]
        assert [(reply.status, reply.body) for reply in replies] == [(200, b"hello")] * 3
        assert replies[0].headers["content-type"] == "text/plain"
    assert server.connections == 1
    assert server.requests == [request] * 3
    assert request.startswith(b"POST /v1/detect?masks=none&x=a+b HTTP/1.1\r\nHost: 127.0.0.1:")
    assert request.endswith(b"\r\nContent-Length: 1024000\r\nA: b\r\n\r\n" + body)


async def test_chunked_answers_are_put_together() -> None:
    server = Answering(
        b"HTTP/1.1 429 Too Many\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n", b"2\r\nlo\r\n0\r\n\r\n"
    )
    async with serving(server) as target, Client(target) as client:
        reply = await client.send(target.request("GET", "/"))
    assert (reply.status, reply.body) == (429, b"hello")


async def test_connection_that_the_server_wants_closed_is_not_used_again() -> None:
    server = Answering(HELLO.replace(b"Content-Type", b"Connection: close\r\nContent-Type"))
    async with serving(server) as target, Client(target) as client:
        for _ in range(2):
            assert (await client.send(target.request("GET", "/"))).status == 200
    assert server.connections == 2


async def test_requests_at_once_have_a_connection_each_up_to_the_bound() -> None:
    server = Answering(HELLO)
    async with serving(server) as target, Client(target, max_connections=3) as client:
        replies = await asyncio.gather(*(client.send(target.request("GET", "/")) for _ in range(10)))
    assert [reply.status for reply in replies] == [200] * 10
    assert server.connections == 3


async def cut_off_in_the_middle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(HELLO[:-1])


async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@pytest.mark.parametrize(
    ("serve", "reason"),
    [(cut_off_in_the_middle, "closed"), (never_answer, "timeout"), (Answering(b"220 mail.example\r\n"), "garbled")],
)
async def test_why_there_is_no_answer_is_said(serve: Serve, reason: str) -> None:
    async with serving(serve) as target, Client(target, timeout_seconds=0.2) as client:
        with pytest.raises(NoAnswerError) as raised:
            await client.send(target.request("GET", "/"))
    assert raised.value.reason == reason


async def test_server_that_is_not_there_refuses() -> None:
    async with serving(never_answer) as target:
        pass
    async with Client(target) as client:
        with pytest.raises(NoAnswerError, match="refused"):
            await client.send(target.request("GET", "/"))


async def test_answer_to_a_request_that_was_given_up_is_not_taken_for_the_next_one() -> None:
    numbers = iter(range(100))
    may_answer = asyncio.Event()

    async def number_answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            number = next(numbers)
            await may_answer.wait()
            writer.write(HELLO.replace(b"hello", b"%05d" % number))

    async with serving(number_answers) as target, Client(target) as client:
        given_up = asyncio.create_task(client.send(target.request("GET", "/")))
        await asyncio.wait([given_up], timeout=0.05)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        may_answer.set()
        assert (await client.send(target.request("GET", "/"))).body == b"00001"


@pytest.mark.parametrize(
    ("url", "address", "host"),
    [
        ("http://example.org", ("example.org", 80), "example.org"),
        ("https://example.org/x", ("example.org", 443), "example.org"),
        ("http://user:word@127.0.0.1:9000", ("127.0.0.1", 9000), "127.0.0.1:9000"),
        ("http://[::1]:8000/", ("::1", 8000), "[::1]:8000"),
    ],
)
def test_urls_are_taken_apart(url: str, address: tuple[str, int], host: str) -> None:
    target = Target.of_url(url)
    assert (target.address, target.host) == (address, host)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://example.org", "http://", "http://a:b", "http://a:0"])
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="expected a URL"):
        Target.of_url(url)
