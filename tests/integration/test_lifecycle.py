"""Start and stop: probes that tell the truth, and an answer for every request that was accepted."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from service.api.state import Phase
from service.devices.cpu import CpuDevice
from service.errors import ModelStoreError
from tests.fakes import POISON, FakePredictor, picture
from tests.integration.conftest import Live
from tests.integration.test_errors import assert_problem

ROOT = Path(__file__).parent.parent.parent


def test_live_but_not_ready_until_the_warm_up_is_done(serve: Callable[..., Live]) -> None:
    predictor = FakePredictor()
    predictor.may_warm_up.clear()
    live = serve(predictor, wait=False)
    assert live.client.get("/healthz").json() == {"status": "ok"}
    assert_problem(live.client.get("/readyz"), 503, "not_ready", "loading")
    refused = live.detect(picture())
    assert_problem(refused, 503, "not_ready", "loading")
    assert refused.headers["Retry-After"] == "1"
    predictor.may_warm_up.set()
    live.wait_until_ready()
    assert live.detect(picture()).status_code == 200
    assert live.metric('roiserve_model_ready{model="fake@1"}') == 1


def test_probes_answer_head_as_get(serve: Callable[..., Live]) -> None:
    live = serve()
    assert [live.client.head(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
    live.state.lifecycle.phase = Phase.DRAINING
    assert [live.client.head(path).status_code for path in ("/healthz", "/readyz")] == [200, 503]


def test_port_in_use_is_said_with_the_flag_to_change() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = subprocess.run(
            [sys.executable, "-m", "tests.integration.serve_fake"],
            cwd=ROOT,
            env={**os.environ, "ROISERVE_PORT": str(port), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=250,
        )
    assert run.returncode == 1
    assert f"port {port} on 127.0.0.1 is in use by another program; choose another with --port" in run.stderr
    assert "Errno" not in run.stderr
    assert "Traceback" not in run.stderr


def test_device_that_hangs_is_not_healthy_until_it_goes_on(serve: Callable[..., Live]) -> None:
    live = serve(probe_timeout_seconds=0.1)
    held = live.hold_device()
    while (response := live.client.get("/healthz")).status_code == 200:
        pass
    assert_problem(response, 503, "not_ready", "for more than 0.1 s")
    assert live.client.get("/readyz").status_code == 503
    live.release_device()
    assert held.result().status_code == 200
    while live.client.get("/healthz").status_code == 503 or live.client.get("/readyz").status_code == 503:
        pass


def test_device_that_is_lost_is_not_healthy_and_gets_no_requests(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: CpuDevice) -> None:
        raise RuntimeError("fallen off the bus")

    live = serve()
    monkeypatch.setattr(CpuDevice, "probe", fail)
    assert_problem(live.detect(picture(red=POISON)), 503, "inference_failed")
    for path in ("/healthz", "/readyz"):
        assert_problem(live.client.get(path), 503, "not_ready", "fallen off the bus")
    assert_problem(live.detect(picture()), 503, "not_ready", "fallen off the bus")


def test_draining_service_wants_no_more_requests_but_still_answers(serve: Callable[..., Live]) -> None:
    live = serve()
    live.state.lifecycle.phase = Phase.DRAINING
    assert_problem(live.client.get("/readyz"), 503, "not_ready", "draining")
    assert live.client.get("/healthz").status_code == 200
    answer = live.detect(picture())
    assert answer.status_code == 200
    assert answer.headers["Connection"] == "close"


def test_request_that_takes_longer_than_the_drain_is_told_so(serve: Callable[..., Live]) -> None:
    live = serve()
    first = live.hold_device()
    live.state.lifecycle.give_up()
    assert_problem(first.result(), 503, "not_ready", "stopped")
    assert "Retry-After" in first.result().headers


class Process:
    """A service in a process of its own, with the fake model; see `serve_fake.py`.

    Attributes:
        log: the lines that it has written since it listens, as they come.
    """

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.log: deque[str] = deque()
        self.client = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def tell(self, word: str) -> None:
        """Hold or release the device, or wait until it is busy; returns when that is done."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == f"{word}\n"


@contextmanager
def process(**environment: str) -> Iterator[Process]:
    variables = {**os.environ, "ROISERVE_PORT": "0", "PYTHONPATH": str(ROOT), **environment}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.integration.serve_fake"],
        cwd=ROOT,
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        reader: threading.Thread | None = None
        try:
            urls = (re.search(r"running on (http://\S+)", line) for line in running.stderr)
            url = next(match[1] for match in urls if match)
            service = Process(running, url)
            # Somebody has to read the log to its end: a full pipe would stop the service at its next line.
            reader = threading.Thread(target=service.log.extend, args=(running.stderr,))
            reader.start()
            with service.client:
                while service.client.get("/readyz").status_code != 200:
                    pass
                yield service
        finally:
            running.kill()
            if reader is not None:
                reader.join()


def send_to_held_device(service: Process, threads: ThreadPoolExecutor, count: int) -> list[Future[httpx.Response]]:
    """Requests of which one is on the device and the others wait for it."""
    service.tell("hold")
    pictures = [picture(red=10 * index + 20) for index in range(count)]
    sent = [threads.submit(service.client.post, "/v1/detect", content=pictures[0])]
    service.tell("wait until busy")
    sent += [threads.submit(service.client.post, "/v1/detect", content=one) for one in pictures[1:]]
    while f'roiserve_queue_depth{{model="fake@1"}} {count - 1}.0' not in service.client.get("/metrics").text:
        pass
    return sent


def test_sigterm_with_queued_work_answers_all_of_it_and_exits_with_0() -> None:
    with process() as service, ThreadPoolExecutor(8) as threads:
        sent = send_to_held_device(service, threads, 8)
        service.process.send_signal(signal.SIGTERM)
        service.tell("release")
        answers = [future.result() for future in sent]
        assert [answer.status_code for answer in answers] == [200] * 8
        assert len({answer.json()["detections"][0]["score"] for answer in answers}) == 8
        assert service.process.wait(60) == 0
    log = "".join(service.log)
    assert re.search(r"ready url=http://127\.0\.0\.1:\d+ docs=http://127\.0\.0\.1:\d+/docs models=fake@1", log)
    assert "draining requests_under_way=8" in log
    assert "stopped status=0" in log


def test_sigterm_turns_readiness_off_first_and_goes_on_serving_for_the_delay() -> None:
    with process(ROISERVE_DRAIN_DELAY_SECONDS="600") as service:
        service.process.send_signal(signal.SIGTERM)
        while service.client.get("/readyz").status_code != 503:
            pass
        assert service.client.post("/v1/detect", content=picture()).status_code == 200


def test_work_that_outlasts_the_drain_is_told_so_and_the_exit_is_still_0() -> None:
    with process(ROISERVE_DRAIN_TIMEOUT_SECONDS="0.2") as service, ThreadPoolExecutor(3) as threads:
        sent = send_to_held_device(service, threads, 3)
        service.process.send_signal(signal.SIGTERM)
        for future in sent:
            assert_problem(future.result(), 503, "not_ready", "stopped")
        assert service.process.wait(60) == 0


def test_second_signal_ends_at_once_with_1() -> None:
    with process() as service, ThreadPoolExecutor(1) as threads:
        [sent] = send_to_held_device(service, threads, 1)
        service.process.send_signal(signal.SIGTERM)
        while service.client.get("/readyz").status_code != 503:
            pass
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 1
        with pytest.raises(httpx.TransportError):
            sent.result()


def test_hangup_reads_the_key_file_again(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("old\n")
    with process(ROISERVE_API_KEYS_FILE=str(keys)) as service:

        def status(key: str) -> int:
            return service.client.get("/v1/models", headers={"X-API-Key": key}).status_code

        assert (status("old"), status("new")) == (200, 403)
        keys.write_text("new\n")
        service.process.send_signal(signal.SIGHUP)
        while status("new") != 200:
            pass
        assert status("old") == 403
        keys.write_text("")
        service.process.send_signal(signal.SIGHUP)
        while not any("the keys stay as they were" in line for line in list(service.log)):
            pass
        assert status("new") == 200


def test_models_that_cannot_be_loaded_are_said_in_words_and_exit_with_1(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "service", "serve", "--port", "0", "--model-store", str(tmp_path / "nowhere")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 1
    assert re.match(r"roiserve: no model store at \S+nowhere: no such folder", run.stderr)
    assert "Traceback" not in run.stderr


def test_failed_warm_up_never_becomes_ready(serve: Callable[..., Live]) -> None:
    live = serve(FakePredictor(warm_up_error=ModelStoreError("the weights are of another model")), wait=False)
    while live.state.lifecycle.failure is None:
        assert live.client.get("/readyz").status_code == 503
    assert str(live.state.lifecycle.failure) == "the weights are of another model"
    assert live.client.get("/readyz").status_code == 503
