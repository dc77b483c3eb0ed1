"""The Grafana dashboard is what its script writes, and every query of it means something to a real Prometheus."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from docker.grafana_dashboard import PATH, Query, dashboard, rows
from tests.fakes import picture
from tests.integration.conftest import Live
from tests.integration.test_metrics_page import free_port, program, wait_for_sample

QUERIES = {
    f"{panel.title} {index}": query
    for row in rows()
    for panel in row.panels
    for index, query in enumerate(panel.queries, start=1)
}


def test_the_file_is_what_the_script_writes() -> None:
    assert json.loads(PATH.read_text()) == json.loads(json.dumps(dashboard())), "python -m docker.grafana_dashboard"


def test_panels_fill_rows_without_overlapping() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


@pytest.fixture(scope="module")
def prometheus(live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A real Prometheus that has scraped the service with some traffic several times."""
    folder = tmp_path_factory.mktemp("prometheus")
    target = {"targets": [httpx.URL(live.url).netloc.decode()]}
    scrape = {"job_name": "roiserve", "scrape_interval": "1s", "static_configs": [target]}
    (folder / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))
    port = free_port()
    command = [program("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            live.detect(picture())
            # A rate needs two scrapes with traffic between them.
            wait_for_sample(port, 'roiserve_requests_total{route="/v1/detect"}')
            while True:
                live.detect(picture())
                rate = wait_for_sample(port, 'sum(rate(roiserve_requests_total{route="/v1/detect"}[1m]))')
                if float(rate["value"][1]) > 0:
                    break
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as client:
                yield client
        finally:
            process.kill()


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_returns_data(name: str, prometheus: httpx.Client) -> None:
    query = QUERIES[name]
    result = ask(prometheus, query)
    assert query.needs_trouble or result, query.expression
    for sample in result:
        for label in labels_of(query):
            assert label in sample["metric"], f"{query.legend} names no label of {query.expression}"


def ask(prometheus: httpx.Client, query: Query) -> list[dict[str, Any]]:
    """What a panel shows when all is chosen."""
    words = {"$instance": ".+", "$model": ".+", "$stage": "backbone", "$__rate_interval": "1m", "$__range": "30m"}
    expression = query.expression
    for variable, value in words.items():
        expression = expression.replace(variable, value)
    response = prometheus.get("/api/v1/query", params={"query": expression, "time": time.time()})
    assert response.status_code == 200, response.text
    result: list[dict[str, Any]] = response.json()["data"]["result"]
    return result


def labels_of(query: Query) -> list[str]:
    return [part.split("}}")[0] for part in query.legend.split("{{")[1:]]


def test_grafana_is_told_where_the_dashboard_lies() -> None:
    root = Path(__file__).parents[2]
    compose = yaml.safe_load((root / "docker-compose.yml").read_text())
    provider = yaml.safe_load((root / "docker/grafana/provisioning/dashboards/roiserve.yml").read_text())
    mounts = dict(reversed(volume.split(":")[:2]) for volume in compose["services"]["grafana"]["volumes"])
    assert root / mounts[provider["providers"][0]["options"]["path"]] == PATH.parent
