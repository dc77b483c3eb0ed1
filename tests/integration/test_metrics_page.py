"""`/metrics` says what happened, in a form that Prometheus itself reads."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes import picture
from tests.integration.conftest import Live


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def test_promtool_finds_nothing_to_complain_about(live: Live) -> None:
    promtool = program("promtool")
    live.detect(picture())
    page = live.client.get("/metrics")
    check = subprocess.run([promtool, "check", "metrics"], input=page.text, capture_output=True, text=True)
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def test_a_real_prometheus_scrapes_it(live: Live, tmp_path: Path) -> None:
    prometheus = program("prometheus")
    live.detect(picture())
    target = {"targets": [httpx.URL(live.url).netloc.decode()]}
    scrape = {"job_name": "roiserve", "scrape_interval": "1s", "static_configs": [target]}
    (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))  # JSON is YAML
    port = free_port()
    command = [prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            info = wait_for_sample(port, 'roiserve_model_info{model="fake@1"}')
            images = wait_for_sample(port, 'roiserve_images_total{model="fake@1",outcome="ok"}')
        finally:
            process.kill()
    assert (info["metric"]["architecture"], info["metric"]["roi_op"]) == ("mask_rcnn", "roi_align")
    assert float(images["value"][1]) >= 1


def wait_for_sample(port: int, query: str) -> dict[str, Any]:
    """What Prometheus answers to a query, once it has an answer; the test's own timeout ends it if it never has."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as client:
        while True:
            try:
                response = client.get("/api/v1/query", params={"query": query})
            except httpx.TransportError:
                continue  # it is still starting
            if response.status_code == 200 and (result := response.json()["data"]["result"]):
                sample: dict[str, Any] = result[0]
                return sample


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_a_request_moves_the_metrics_that_it_should(live: Live) -> None:
    lines = [
        'roiserve_requests_total{route="/v1/detect",status="200"}',
        'roiserve_request_duration_seconds_count{route="/v1/detect"}',
        'roiserve_images_total{model="fake@1",outcome="ok"}',
        'roiserve_batch_size_count{model="fake@1"}',
        'roiserve_batch_padding_ratio_count{model="fake@1"}',
        'roiserve_detections_per_image_sum{model="fake@1"}',
        *(
            f'roiserve_stage_duration_seconds_count{{model="fake@1",stage="{stage}"}}'
            for stage in ("decode", "queue", "backbone", "roi_heads", "encode")
        ),
    ]
    before = [live.metric(line) for line in lines]
    live.detect(picture(red=204))
    after = [live.metric(line) for line in lines]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1]


def test_errors_are_counted_by_their_code(live: Live) -> None:
    live.detect(b"nonsense")
    assert live.metric('roiserve_images_total{model="fake@1",outcome="unsupported_image"}') >= 1
    assert live.metric('roiserve_requests_total{route="/v1/detect",status="415"}') >= 1


def test_description_of_the_routes_is_counted_as_a_route_of_its_own(live: Live) -> None:
    live.client.get("/openapi.json")
    assert live.metric('roiserve_requests_total{route="/openapi.json",status="200"}') >= 1


def test_routes_that_strangers_make_up_are_one_series(live: Live) -> None:
    for path in ("/a", "/b", "/v1/nothing"):
        live.client.get(path)
    page = live.client.get("/metrics").text
    assert 'route="unmatched",status="404"' in page
    assert "/v1/nothing" not in page
    live.client.get("/v1/models/made-up")
    assert 'route="/v1/models/{name}",status="404"' in live.client.get("/metrics").text
