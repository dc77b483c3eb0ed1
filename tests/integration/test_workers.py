"""Worker processes behind the real HTTP: what happens to them is no caller's business."""

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from service.workers import supervision
from service.workers.pool import WorkerPool
from tests.fakes import KILLER, picture
from tests.faulty_workers import die_while_starting
from tests.integration.conftest import Live, running_workers
from tests.integration.test_errors import assert_problem
from tests.integration.test_lifecycle import ROOT

ADMIN = {"X-API-Key": "root"}


@pytest.fixture
def live() -> Iterator[Live]:
    with running_workers(admin_keys="root", request_timeout_ms=300_000) as live:
        live.client.headers.update(ADMIN)
        live.wait_until_ready()
        yield live


def worker_pid(live: Live) -> int:
    assert isinstance(live.state.detector, WorkerPool)
    return live.state.detector.pids[0]


def test_killed_worker_takes_no_request_with_it(live: Live) -> None:
    sent = [live.in_background(live.detect, picture(red=red)) for red in range(30, 80)]
    sent[0].result()
    os.kill(worker_pid(live), signal.SIGKILL)
    assert [future.result().status_code for future in sent] == [200] * 50
    assert live.metric('roiserve_worker_restarts_total{reason="killed"}') == 1
    assert live.metric('roiserve_images_total{model="fake@1",outcome="ok"}') == 50


def test_not_ready_while_no_worker_is_alive_but_healthy_since_one_is_coming(live: Live) -> None:
    os.kill(worker_pid(live), signal.SIGKILL)
    while (response := live.client.get("/readyz")).status_code == 200:
        pass
    assert_problem(response, 503, "not_ready", "no worker is alive")
    assert live.client.get("/healthz").status_code == 200
    assert live.detect(picture()).status_code == 200
    assert live.client.get("/readyz").status_code == 200


def test_not_healthy_while_no_worker_can_be_started_and_healthy_again_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "_FIRST_BACKOFF_SECONDS", 0.001)
    with running_workers(die_while_starting, model_store=tmp_path) as live:
        live.wait_until_ready()
        (tmp_path / "die").touch()
        os.kill(worker_pid(live), signal.SIGKILL)
        while (response := live.client.get("/healthz")).status_code == 200:
            pass
        assert_problem(response, 503, "not_ready", "starts in a row failed")
        assert live.client.get("/readyz").status_code == 503
        refused = live.detect(picture())
        assert_problem(refused, 503, "not_ready", "another try will follow")
        assert int(refused.headers["Retry-After"]) >= 1
        (tmp_path / "die").unlink()
        live.wait_until_ready()
        assert live.client.get("/healthz").status_code == 200
        assert live.detect(picture()).status_code == 200


def test_only_the_image_that_kills_its_worker_is_refused(live: Live) -> None:
    reds = [*range(30, 40), KILLER, *range(40, 50)]
    sent = [live.in_background(live.detect, picture(red=red)) for red in reds]
    assert_problem(sent.pop(10).result(), 422, "poisonous_image", "stopped the worker 2 times")
    assert [future.result().status_code for future in sent] == [200] * 20


def test_memory_of_the_workers_is_reported(live: Live) -> None:
    while live.metric('roiserve_device_memory_bytes{device="cpu",kind="resident"}') < 10_000_000:
        pass


def test_abandoned_request_is_counted_once_and_frees_its_place(live: Live) -> None:
    os.kill(worker_pid(live), signal.SIGSTOP)
    with pytest.raises(httpx.TimeoutException):
        live.client.post("/v1/detect", content=picture(), timeout=0.5)
    os.kill(worker_pid(live), signal.SIGCONT)
    live.wait_for_metric('roiserve_images_total{model="fake@1",outcome="cancelled"}', 1)
    assert live.detect(picture()).status_code == 200


def test_model_is_swapped_under_load_and_no_request_fails(live: Live) -> None:
    stop = threading.Event()

    def ask() -> list[tuple[int, int]]:
        answers = []
        while not stop.is_set():
            response = live.detect(picture())
            answers.append((response.status_code, response.json().get("version")))
        return answers

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask) for _ in range(4)]
        loaded = live.client.post("/v1/models/fake/load", params={"version": 2})
        assert (loaded.status_code, loaded.json()["version"]) == (200, 2)
        live.detect(picture())
        stop.set()
        answers = [one.result() for one in asking]
    for one in answers:
        assert {status for status, _ in one} == {200}
        assert [version for _, version in one] == sorted(version for _, version in one)
    assert live.metric('roiserve_model_ready{model="fake@2"}') == 1
    assert 'model="fake@1",version="1"' not in live.client.get("/metrics").text
    assert [model["version"] for model in live.client.get("/v1/models").json()["models"]] == [2]


def test_failed_load_says_why_and_the_old_model_serves_on(live: Live) -> None:
    assert_problem(live.client.post("/v1/models/broken/load"), 409, "model_store_error", "broken/1/weights.safetensors")
    assert live.detect(picture()).json()["version"] == 1
    assert_problem(live.client.post("/v1/models/fake/unload"), 409, "model_needed")
    assert_problem(live.client.post("/v1/models/nope/unload"), 404, "model_not_found")


def test_model_is_added_and_unloaded(live: Live) -> None:
    assert live.client.post("/v1/models/other/load").json()["default"] is False
    assert live.detect(picture(), model="other").status_code == 200
    assert live.client.post("/v1/models/other/unload").status_code == 204
    assert_problem(live.detect(picture(), model="other"), 404, "model_not_found")


def test_models_are_changed_by_administrators_only(serve: Callable[..., Live]) -> None:
    open_to_all = serve()
    assert_problem(open_to_all.client.post("/v1/models/fake/load"), 403, "key_not_allowed", "ROISERVE_ADMIN_KEYS")
    live = serve(api_keys="user", admin_keys="root")
    for action in ("load", "unload"):
        assert_problem(live.client.post(f"/v1/models/fake/{action}"), 401, "missing_key")
        refused = live.client.post(f"/v1/models/fake/{action}", headers={"X-API-Key": "user"})
        assert_problem(refused, 403, "key_not_allowed", "administrator")


@contextmanager
def server(*, max_descriptors: int | None = None) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """The service in a process of its own, with worker processes."""
    limit = "" if max_descriptors is None else f"ulimit -n {max_descriptors}; "
    with subprocess.Popen(
        ["bash", "-c", f"{limit}exec {sys.executable} -m tests.integration.serve_workers"],
        cwd=ROOT,
        env={**os.environ, "ROISERVE_PORT": "0", "ROISERVE_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        reader = threading.Thread(target=deque, args=(process.stderr, 0))
        urls = (re.search(r"running on (http://\S+)", line) for line in process.stderr)
        url = next(match[1] for match in urls if match)
        reader.start()
        try:
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
                yield process, client
        finally:
            process.kill()
            reader.join()


def wait_until_ready(client: httpx.Client) -> None:
    while client.get("/readyz").status_code != 200:
        pass


def family_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The fork server and the workers."""
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    assert processes
    assert psutil.wait_procs(processes, timeout=60)[1] == []


def test_sigterm_to_all_processes_lets_the_work_finish_and_leaves_none() -> None:
    with server() as (process, client), ThreadPoolExecutor(8) as threads:
        wait_until_ready(client)
        family = family_of(process)
        sent = [threads.submit(client.post, "/v1/detect", content=picture(red=red)) for red in range(30, 60)]
        sent[0].result()
        # As a service manager does it.
        for pid in (*(one.pid for one in family), process.pid):
            os.kill(pid, signal.SIGTERM)
        statuses = [future.result().status_code for future in sent if not future.exception()]
        assert set(statuses) == {200}
        assert process.wait(60) == 0
        assert_gone(family)


def test_sigterm_while_a_worker_starts_ends_in_order() -> None:
    with server() as (process, client):
        assert client.get("/readyz").status_code == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_workers_do_not_outlive_a_server_that_is_killed() -> None:
    with server() as (process, client):
        wait_until_ready(client)
        family = family_of(process)
        process.kill()
        assert_gone(family)


def test_idle_connections_leave_descriptors_for_a_new_worker_and_are_survived() -> None:
    with server(max_descriptors=64) as (process, client), ExitStack() as idle:
        wait_until_ready(client)
        assert client.post("/v1/detect", content=picture()).status_code == 200
        address = (client.base_url.host, client.base_url.port or 80)
        for _ in range(80):
            idle.enter_context(socket.create_connection(address))
        [worker] = [one for one in family_of(process) if one.ppid() != process.pid]
        worker.kill()
        # Over the connection that is open: others would be refused, or wait.
        answer = client.post("/v1/detect", content=picture())
        assert answer.status_code == 200
        metrics = client.get("/metrics").text
        assert 'roiserve_worker_restarts_total{reason="killed"} 1.0' in metrics
        assert 'reason="start_failed"' not in metrics
        idle.close()
        while True:
            with suppress(httpx.TransportError), httpx.Client(base_url=client.base_url, trust_env=False) as another:
                if another.get("/healthz").status_code == 200:
                    break


def test_connection_too_many_is_refused_in_words() -> None:
    with server(max_descriptors=64) as (_, client), ExitStack() as idle:
        wait_until_ready(client)
        address = (client.base_url.host, client.base_url.port or 80)
        refusals = b""
        for _ in range(60):
            connection = idle.enter_context(socket.create_connection(address))
            connection.settimeout(0.05)
            with suppress(OSError):
                refusals += connection.recv(4096)
            if refusals:
                break
        assert refusals.startswith(b"HTTP/1.1 503 ")
        assert b"too many connections" in refusals
