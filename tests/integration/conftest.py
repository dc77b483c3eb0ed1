"""A running service for the tests: the real app over real HTTP, with a small fake model."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, sync_playwright

from service.api.state import ApiState
from service.app import create_app
from service.commands._server import server_config
from service.pipeline import Predictor
from service.settings import Settings
from service.workers.detector import PredictorFactory
from tests.fakes import FAKE_BOXES_INFO, FakePredictor, load_fakes, picture


class _Server(uvicorn.Server):
    """A server that says when it listens, so that nobody has to sleep until it does."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = threading.Event()

    async def startup(self, sockets: object = None) -> None:
        await super().startup()
        self.listens.set()

    @property
    def url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{host}:{port}"


class Live:
    """A service that runs.

    Attributes:
        client: speaks to it.
        predictor: the fake that is its default model.
        state: what its routes share.
    """

    def __init__(self, url: str, predictor: FakePredictor, state: ApiState) -> None:
        self.url = url
        self.predictor = predictor
        self.state = state
        self.client = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self._threads = ThreadPoolExecutor(32)

    def in_background(self, send: Callable[..., httpx.Response], *args: Any, **options: Any) -> Future[httpx.Response]:
        """Send a request in a thread, to do something else while it is under way."""
        return self._threads.submit(send, *args, **options)

    def detect(self, content: bytes, content_type: str = "image/png", **options: str | int | float) -> httpx.Response:
        """POST a raw image."""
        return self.client.post("/v1/detect", content=content, headers={"Content-Type": content_type}, params=options)

    def wait_until_ready(self) -> None:
        while self.client.get("/readyz").status_code != 200:
            assert self.state.lifecycle.failure is None

    def hold_device(self) -> Future[httpx.Response]:
        """Let the device work on a first request until `release_device`."""
        self.predictor.device_is_free.clear()
        first = self.in_background(self.detect, picture())
        assert self.predictor.device_is_busy.wait(60)
        return first

    def release_device(self) -> None:
        self.predictor.device_is_free.set()

    def wait_for_metric(self, line: str, value: float) -> None:
        """Ask until a series has a value; the test's own timeout ends it if it never does."""
        while self.metric(line) != value:
            pass

    def metric(self, line: str) -> float:
        """The value of one series, written as Prometheus does."""
        for found in self.client.get("/metrics").text.splitlines():
            if found.startswith(f"{line} "):
                return float(found.rpartition(" ")[2])
        return 0.0


@contextmanager
def running(predictor: FakePredictor, others: Sequence[Predictor] = (), **settings: Any) -> Iterator[Live]:
    """Run a service in a thread."""
    values = {"port": 0, "drain_timeout_seconds": 1, **settings}
    with _serving(create_app(Settings(**values), predictors=[predictor, *others]), predictor) as live:
        yield live


@contextmanager
def running_workers(factory: PredictorFactory = load_fakes, **settings: Any) -> Iterator[Live]:
    """Run a service in a thread, and its fake model in worker processes, where no test can hold it."""
    values = {"port": 0, "drain_timeout_seconds": 1, "device": "cpu", **settings}
    with _serving(create_app(Settings(**values), predictor_factory=factory), FakePredictor()) as live:
        yield live


@contextmanager
def _serving(app: FastAPI, predictor: FakePredictor) -> Iterator[Live]:
    server = _Server(server_config(app))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert server.listens.wait(60)
        live = Live(server.url, predictor, app.state.api)
        with live.client, live._threads:
            try:
                yield live
            finally:
                predictor.may_warm_up.set()
                predictor.device_is_free.set()
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[..., Live]]:
    """Starts a service of a test's own, ready or still loading; it is stopped at the end of the test."""
    with ExitStack() as stack:

        def start(predictor: FakePredictor | None = None, *, wait: bool = True, **settings: Any) -> Live:
            live = stack.enter_context(running(predictor or FakePredictor(), **settings))
            if wait:
                live.wait_until_ready()
            return live

        yield start


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real browser, which finds no server but ours, and has a camera that shows a test picture."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("chromium is not installed")
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    camera = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu", "--no-proxy-server", offline, *camera]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service that tests share, with a model that has masks and one that has none."""
    with running(FakePredictor(), [FakePredictor(FAKE_BOXES_INFO)], max_body_bytes=1_000_000) as live:
        live.wait_until_ready()
        yield live
