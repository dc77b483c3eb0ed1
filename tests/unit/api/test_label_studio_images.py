"""Images are fetched from the one Label Studio that the settings name, and nothing else is ever asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from service.api.errors import ImageNotFetchedError
from service.api.label_studio_images import LabelStudioImages, label_studio_images
from service.batching.held_bytes import HeldBytes, Holding
from service.errors import DeadlineExceededError, OverloadedError, TooLargeError
from service.settings import Settings

JWT = "header.payload.signature"
IMAGE = b"\x89PNG" + bytes(1000)


class Studio(ThreadingHTTPServer):
    """What a Label Studio answers.

    Attributes:
        image: its answer to most paths.
        asked: method, path and Authorization of each request.
        may_go_on: answers to /data/slow wait for it.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.image = IMAGE
        self.asked: list[tuple[str, str, str | None]] = []
        self.may_go_on = threading.Event()

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Studio]:
        with cls() as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            yield server
            server.may_go_on.set()
            server.shutdown()
            thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Studio

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization")))
        if self.path.endswith("/data/moved"):
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/data/a.png")
            self.end_headers()
        elif self.path.endswith("/data/secret"):
            self.send_error(401)
        elif self.path.endswith("/data/cut"):
            self._send(IMAGE, length=2000)
        elif self.path.endswith("/data/huge"):
            self._send(IMAGE, length=10**9)
        elif self.path.endswith("/data/endless"):
            self.send_response(200)
            self.end_headers()
            while not self.server.may_go_on.is_set():
                self.wfile.write(bytes(65536))
        elif self.path.endswith("/data/slow"):
            self.server.may_go_on.wait()
        else:
            self._send(self.server.image)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization")))
        self._send(json.dumps({"access": f"access-for-{json.loads(body)['refresh']}"}).encode())

    def _send(self, body: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # the other side hung up, as it should
            super().handle()


@pytest.fixture
def studio() -> Iterator[Studio]:
    with Studio.running() as server:
        yield server


@pytest.fixture
def holding() -> Iterator[Holding]:
    with HeldBytes(10**8).hold() as one:
        yield one


async def fetch(url: str, address: str, holding: Holding, *, key: str | None = "abc", seconds: float = 60.0) -> bytes:
    images = LabelStudioImages(url, key, max_bytes=10_000_000)
    return await images.fetch(address, deadline=time.monotonic() + seconds, holding=holding)


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("/data/upload/1/a.png", "/data/upload/1/a.png"),
        ("{url}/data/upload/1/a.png#x", "/data/upload/1/a.png"),
        ("/data/upload/1/my cät.png", "/data/upload/1/my%20c%C3%A4t.png"),
        ("/data/upload/1/my%20cat.png", "/data/upload/1/my%20cat.png"),
        ("/data/local-files/?d=a/b c.png", "/data/local-files/?d=a/b%20c.png"),
        ("/storage-data/uploaded/?filepath=upload/1/a.png", "/storage-data/uploaded/?filepath=upload/1/a.png"),
    ],
)
async def test_image_is_fetched_with_the_key(studio: Studio, holding: Holding, address: str, asked: str) -> None:
    assert await fetch(studio.url, address.format(url=studio.url), holding) == IMAGE
    assert studio.asked == [("GET", asked, "Token abc")]
    assert holding.size == len(IMAGE)


@pytest.mark.parametrize("address", ["/data/a.png", "/studio/data/a.png", "{url}/studio/data/a.png"])
async def test_label_studio_may_lie_below_a_path(studio: Studio, holding: Holding, address: str) -> None:
    assert await fetch(f"{studio.url}/studio", address.format(url=studio.url), holding, key=None) == IMAGE
    assert studio.asked == [("GET", "/studio/data/a.png", None)]


async def test_personal_token_is_exchanged_once_a_minute(studio: Studio, holding: Holding) -> None:
    images = LabelStudioImages(studio.url, JWT, max_bytes=10_000)
    for _ in range(2):
        await images.fetch("/data/a.png", deadline=time.monotonic() + 60, holding=holding)
    assert studio.asked == [
        ("POST", "/api/token/refresh", None),
        ("GET", "/data/a.png", f"Bearer access-for-{JWT}"),
        ("GET", "/data/a.png", f"Bearer access-for-{JWT}"),
    ]


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:1/data/a.png",
        "http://169.254.169.254/data/latest",
        "https://127.0.0.1/data/a.png",
        "//127.0.0.1:1/data/a.png",
        "http://user@{netloc}/data/a.png",
        "http://{netloc}@127.0.0.1:1/data/a.png",
        "http:/data/a.png",
        "file:///data/a.png",
        "ftp://{netloc}/data/a.png",
        "s3://bucket/a.png",
        "gopher://{netloc}/data/a.png",
        "http://[::1/data/a.png",
        "/api/projects/",
        "/user/logout",
        "/data/../api/projects/",
        "/data/%2e%2e/api/projects/",
        "/data/..%2fapi/projects/",
        "/data/..\\api",
        "/data/a\r\nHost: evil",
        "/data/a%0d%0aHost: evil",
        "data/a.png",
        "a.png",
        "",
        "/" * 5000,
    ],
)
async def test_nothing_else_is_asked(studio: Studio, holding: Holding, address: str) -> None:
    address = address.format(netloc=studio.url.removeprefix("http://"))
    try:
        await fetch(studio.url, address, holding)
    except ImageNotFetchedError as error:
        assert "expected an address at http://127.0.0.1" in str(error)
        assert len(str(error)) < 500
        assert studio.asked == []
    else:
        # Line breaks are left out of addresses, as browsers do, so that no second header can be made of one.
        assert studio.asked == [("GET", "/data/aHost:%20evil", "Token abc")]


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("/data/moved", ImageNotFetchedError, "redirects"),
        ("/data/secret", ImageNotFetchedError, "answered 401 Unauthorized; see label_studio_api_key"),
        ("/data/cut", ImageNotFetchedError, "broke off after 1004 bytes"),
        ("/data/huge", TooLargeError, "1000000000 bytes, at most 10000000"),
        ("/data/endless", TooLargeError, "more than the 10000000 bytes"),
    ],
)
async def test_failures_are_told_and_hold_nothing(
    studio: Studio, holding: Holding, path: str, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        await fetch(studio.url, path, holding)
    assert [path for _, path, _ in studio.asked] == [path]
    assert holding.size == 0


async def test_silent_server_costs_no_more_than_the_deadline(studio: Studio, holding: Holding) -> None:
    with pytest.raises(DeadlineExceededError, match="while an image was fetched"):
        await fetch(studio.url, "/data/slow", holding, seconds=0.2)
    assert holding.size == 0


async def test_server_that_is_not_there_is_told(holding: Holding) -> None:
    with pytest.raises(ImageNotFetchedError, match="cannot be reached"):
        await fetch("http://127.0.0.1:1", "/data/a.png", holding)


async def test_images_count_among_the_bytes_that_are_held(studio: Studio) -> None:
    held = HeldBytes(2000)
    with held.hold() as other, held.hold() as holding:
        other.add(1500)
        with pytest.raises(OverloadedError):
            await fetch(studio.url, "/data/a.png", holding)
        assert held.size == 1500


def test_without_the_setting_nothing_is_fetched() -> None:
    assert label_studio_images(Settings()) is None


@pytest.mark.parametrize("url", ["labelstudio", "ftp://a", "http://user:word@a", "http://a/?x=1", "http://a b"])
def test_settings_refuse_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match=r"label_studio_url\n *expected an address such as http://label-studio:8080"):
        Settings(label_studio_url=url)
