"""When a call is tried again, how long it waits, and that it ends with its deadline."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from roiserve_client import (
    DeadlineExceededError,
    NoAnswerError,
    ProblemError,
    UnreachableError,
)
from roiserve_client.calls import MODELS_CALL, Pause, Reply, Send, steps
from roiserve_client.errors import ServerDeadlineError
from tests.client.conftest import Connect
from tests.fakes import FakePredictor, picture
from tests.integration.conftest import Live

PICTURE = picture()
MODELS = Reply(200, httpx.Headers(), b'{"models": []}')


def refusal(status: int, retry_after: str | None = None, code: str = "overloaded") -> Reply:
    headers = httpx.Headers({} if retry_after is None else {"Retry-After": retry_after})
    return Reply(status, headers, f'{{"code": "{code}", "detail": "d"}}'.encode())


def pauses(*outcomes: Any, timeout_seconds: float = 100, retries: int = 5) -> tuple[list[float], object]:
    """How long a call that meets these outcomes waits between them, and how it ends. Nothing here waits."""
    script = steps(MODELS_CALL, timeout_seconds=timeout_seconds, retries=retries)
    waited: list[float] = []
    try:
        step = next(script)
        for outcome in outcomes:
            assert isinstance(step, Send)
            step = script.send(outcome)
            assert isinstance(step, Pause)
            waited.append(step.seconds)
            step = script.send(None)
    except StopIteration as finished:
        return waited, finished.value
    except Exception as error:
        return waited, error
    return waited, None


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_retry_after_is_honoured(status: int) -> None:
    [seconds], answer = pauses(refusal(status, "7"), MODELS)
    assert 7 <= seconds <= 7.25
    assert answer == []


def test_retry_after_may_be_a_date() -> None:
    [seconds], _ = pauses(refusal(503, format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)), MODELS)
    assert 15 < seconds <= 20.25


@pytest.mark.parametrize("value", [None, "soon", "-1", "Mon, 99 Foo 2000"])
def test_pauses_grow_where_the_server_says_nothing_of_use(value: str | None) -> None:
    waited, answer = pauses(*[refusal(429, value)] * 4, MODELS)
    assert answer == []
    assert all(0.125 * 2**n <= seconds <= 0.25 * 2**n for n, seconds in enumerate(waited))


def test_callers_that_were_refused_together_do_not_come_back_together() -> None:
    assert len({pauses(refusal(429, "1"), MODELS)[0][0] for _ in range(20)}) == 20


def test_call_ends_with_the_refusal_when_the_server_asks_for_more_time_than_there_is() -> None:
    waited, error = pauses(refusal(429, "7"), timeout_seconds=5)
    assert waited == []
    assert isinstance(error, ProblemError)
    assert error.retry_after_seconds == 7
    assert error.__notes__[0].startswith("not tried again: that would be in 7.")


def test_retries_are_bounded() -> None:
    waited, error = pauses(*[refusal(429, "0")] * 9, retries=2)
    assert (len(waited), type(error)) == (2, ProblemError)
    assert pauses(httpx.ReadError("reset"), retries=0)[0] == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 415, 422, 500, 507])
def test_what_fails_again_is_not_tried_again(status: int) -> None:
    waited, error = pauses(refusal(status, "1", "x"))
    assert (waited, type(error)) == ([], ProblemError)


def test_failed_model_is_tried_once_more() -> None:
    waited, error = pauses(*[refusal(503, "1", "inference_failed")] * 3)
    assert (len(waited), type(error)) == (1, ProblemError)


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (httpx.ConnectError("refused"), UnreachableError),
        (httpx.ConnectTimeout("nobody"), UnreachableError),
        (httpx.ReadError(""), NoAnswerError),
        (httpx.RemoteProtocolError("closed"), NoAnswerError),
    ],
)
def test_broken_connections_are_tried_again(broken: httpx.RequestError, kind: type[NoAnswerError]) -> None:
    waited, answer = pauses(broken, MODELS)
    assert (len(waited), answer) == (1, [])
    waited, error = pauses(*[broken] * 6)
    assert (len(waited), type(error)) == (5, kind)


@pytest.mark.parametrize("outcome", [httpx.ReadTimeout("slow"), TimeoutError("slow")])
def test_time_that_ran_out_is_not_spent_again(outcome: Exception) -> None:
    waited, error = pauses(outcome)
    assert (waited, type(error)) == ([], DeadlineExceededError)


def test_full_queue_is_waited_for(serve: Callable[..., Live], connect: Connect) -> None:
    """A real queue, really full: the call is refused with 429, comes back after `Retry-After`, and gets its answer."""
    live = serve(max_queue_size=1, max_batch_size=1)
    held = [live.hold_device(), live.in_background(live.detect, PICTURE)]
    live.wait_for_metric('roiserve_queue_depth{model="fake@1"}', 1)
    with ThreadPoolExecutor() as threads:
        begin = time.monotonic()
        call = threads.submit(connect(live.url).detect, PICTURE)
        while live.metric('roiserve_rejected_total{reason="overloaded"}') == 0:
            assert not call.done()
        live.release_device()
        assert call.result().labels == ["cat", "dog"]
    assert time.monotonic() - begin >= 1  # the server's shortest Retry-After
    assert [one.result().status_code for one in held] == [200, 200]


def test_server_that_is_loading_is_waited_for(serve: Callable[..., Live], connect: Connect) -> None:
    predictor = FakePredictor()
    predictor.may_warm_up.clear()
    live = serve(predictor, wait=False)
    with ThreadPoolExecutor() as threads:
        call = threads.submit(connect(live.url).detect, PICTURE)
        while live.metric('roiserve_rejected_total{reason="not_ready"}') == 0:
            assert not call.done()
        predictor.may_warm_up.set()
        assert call.result().labels == ["cat", "dog"]


def test_deadline_reaches_the_server_which_frees_the_place(serve: Callable[..., Live], connect: Connect) -> None:
    live = serve()
    held = live.hold_device()
    with pytest.raises(DeadlineExceededError) as raised:
        connect(live.url).detect(PICTURE, timeout=0.5)
    assert isinstance(raised.value, ServerDeadlineError)
    assert (raised.value.status, raised.value.stage) == (504, "queue")
    live.release_device()
    assert held.result().status_code == 200
    assert live.predictor.batches == [1]


@contextmanager
def listening(handle: Callable[[socket.socket, int], None]) -> Iterator[str]:
    """A server that does as told with each connection, and which one it is."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(8) as threads:

        def accept() -> None:
            number = 0
            while True:
                connection, _ = server.accept()
                if stop.is_set():
                    connection.close()
                    return
                threads.submit(handle, connection, number)
                number += 1

        host, port = server.getsockname()
        accepting = threads.submit(accept)
        try:
            yield f"http://{host}:{port}"
        finally:
            stop.set()
            socket.create_connection((host, port)).close()
            accepting.result()


def test_server_that_never_answers_is_left_at_the_deadline(connect: Connect) -> None:
    left = threading.Event()

    def wait(connection: socket.socket, number: int) -> None:
        with connection:
            left.wait(60)

    with listening(wait) as url:
        try:
            with pytest.raises(DeadlineExceededError, match=r"no answer within 0\.3 s"):
                connect(url).detect(PICTURE, timeout=0.3)
        finally:
            left.set()


def test_answer_that_drips_is_left_at_the_deadline(connect: Connect) -> None:
    """No single read takes long, but all of them together would never end."""

    def drip(connection: socket.socket, number: int) -> None:
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while True:
                connection.sendall(b" ")
                time.sleep(0.02)

    with listening(drip) as url, pytest.raises(DeadlineExceededError):
        connect(url, retries=0).detect(PICTURE, timeout=0.4)


@pytest.mark.parametrize("dies", ["at once", "in the head", "in the body"])
def test_connection_that_dies_is_made_again(live: Live, connect: Connect, dies: str) -> None:
    target = httpx.URL(live.url)
    beginnings = {
        "at once": b"",
        "in the head": b"HTTP/1.1 200",
        "in the body": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
    }

    def handle(connection: socket.socket, number: int) -> None:
        with connection:
            if number == 0:
                connection.recv(100)
                connection.sendall(beginnings[dies])
                return
            with socket.create_connection((str(target.host), target.port or 0)) as server:
                relay(connection, server)

    with listening(handle) as url:
        answer = connect(url, timeout=30).detect(PICTURE)
    assert answer.labels == ["cat", "dog"]


def relay(caller: socket.socket, server: socket.socket) -> None:
    """Pass on one request and its answer."""
    thread = threading.Thread(target=pass_on, args=(caller, server))
    thread.start()
    answer = b""
    while not is_whole(answer):
        answer += server.recv(65536)
    caller.sendall(answer)
    caller.shutdown(socket.SHUT_RDWR)
    thread.join()


def pass_on(caller: socket.socket, server: socket.socket) -> None:
    with suppress(OSError):
        while data := caller.recv(65536):
            server.sendall(data)


def is_whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, flags=re.IGNORECASE)
    return bool(end) and length is not None and len(body) == int(length[1])


def test_nobody_there_is_said(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UnreachableError, match="no connection to the server"):
        connect(f"http://127.0.0.1:{port}", retries=1).detect(PICTURE)
