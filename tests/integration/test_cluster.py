"""The service on a real Ray Serve cluster: two detector replicas behind its HTTP proxy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.fakes import picture

pytest.importorskip("ray", reason="the extra ray is not installed")


class Cluster:
    """A cluster in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        address = self._read()
        assert address.startswith("http://"), address
        self.client = httpx.Client(base_url=address, timeout=60, trust_env=False)

    def tell(self, command: str) -> int:
        """Send a command; returns how many detector replicas there are afterwards."""
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        return int(self._read())

    def detect(self, content: bytes) -> httpx.Response:
        return self.client.post("/v1/detect", content=content, headers={"Content-Type": "image/png"})

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def cluster_of(**arguments: object) -> Iterator[Cluster]:
    command = [sys.executable, "-m", "tests.integration.serve_cluster", json.dumps({"device": "cpu", **arguments})]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    ) as process:
        try:
            yield Cluster(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_of(min_replicas=2, max_replicas=2, max_queue_size=4, max_batch_size=2) as cluster, cluster.client:
        yield cluster


def test_answers_are_those_of_one_process(cluster: Cluster, serve: Callable[..., object]) -> None:
    from tests.integration.conftest import Live

    live = serve()
    assert isinstance(live, Live)
    for red in (0, 100, 204):
        alone, spread = live.detect(picture(red=red)).json(), cluster.detect(picture(red=red)).json()
        assert spread["detections"] == alone["detections"]
        assert spread["image"] == alone["image"]


def test_errors_name_whom_to_blame(cluster: Cluster) -> None:
    response = cluster.detect(b"nonsense")
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_image")
    assert response.headers["content-type"] == "application/problem+json"


def test_a_replica_killed_under_load_loses_no_answer(cluster: Cluster) -> None:
    contents = [picture(red=red) for red in range(50, 250)]
    with ThreadPoolExecutor(6) as callers:
        answers = callers.map(cluster.detect, contents)
        first = next(answers)
        cluster.tell("kill")
        statuses = [first.status_code, *(answer.status_code for answer in answers)]
    assert statuses == [200] * 200
    while cluster.tell("replicas") < 2:
        pass


def test_more_than_the_replicas_take_is_refused_with_a_time_to_come_back(cluster: Cluster) -> None:
    with ThreadPoolExecutor(64) as callers:
        answers = list(callers.map(cluster.detect, [picture()] * 256))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert all(answer.json()["code"] == "overloaded" for answer in refused)


def test_metrics_of_the_replicas_reach_the_ingress(cluster: Cluster) -> None:
    assert cluster.detect(picture()).status_code == 200
    page = cluster.client.get("/metrics").text
    assert 'roiserve_images_total{model="fake@1",outcome="ok"}' in page
    assert 'roiserve_stage_duration_seconds_count{model="fake@1",stage="backbone"}' in page
    assert "roiserve_device_memory_bytes{" in page


def test_models_of_a_cluster_are_changed_by_deploying_again(cluster: Cluster) -> None:
    response = cluster.client.post("/v1/models/fake/load")
    assert response.status_code in (401, 403, 422), response.text
