"""Our alert rules in a real Prometheus: an overloaded service fires, and resolves when the load has gone."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import yaml

from tests.fakes import picture
from tests.integration.conftest import Live
from tests.integration.test_metrics_page import free_port, program

RULES = Path(__file__).parents[2] / "docker/prometheus"


def test_overload_fires_an_alert_that_resolves_afterwards(serve: Callable[..., Live], tmp_path: Path) -> None:
    live = serve(max_queue_size=1, max_batch_size=1)
    port = free_port()
    command = [program("prometheus"), f"--config.file={hurried_configuration(live, tmp_path)}"]
    command += [f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"]
    is_over = threading.Event()

    def insist() -> None:
        while not is_over.wait(0.05):
            live.detect(picture())

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            live.hold_device()
            callers = [threading.Thread(target=insist) for _ in range(4)]
            for caller in callers:
                caller.start()
            wait_until_firing(port, {"RoIServeOverloaded"})
            is_over.set()
            live.release_device()
            wait_until_firing(port, set())
            for caller in callers:
                caller.join()
        finally:
            is_over.set()
            live.release_device()
            process.kill()


def hurried_configuration(live: Live, folder: Path) -> Path:
    """Our own configuration and rules, where every minute is a second, so that nobody waits for five minutes."""
    configuration = yaml.safe_load((RULES / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    netloc = httpx.URL(live.url).netloc.decode()
    configuration["scrape_configs"][0]["static_configs"] = [{"targets": [netloc]}]
    (folder / "rules.yml").write_text(re.sub(r"\b(\d+)m\b", r"\1s", (RULES / "rules.yml").read_text()))
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(configuration))
    return path


def wait_until_firing(port: int, names: set[str]) -> None:
    """Until these alerts of traffic fire and no others; the test's own timeout ends it if they never do."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as client:
        while True:
            try:
                response = client.get("/api/v1/alerts")
            except httpx.TransportError:
                continue  # it is still starting
            if response.status_code != 200:
                continue
            alerts = response.json()["data"]["alerts"]
            firing = {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}
            if firing & {"RoIServeOverloaded"} == names:
                return
