"""A real server in processes of its own, as `roiserve serve` runs it, and what can be seen of it from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import httpx
import psutil

from service.load.client import Target

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 240.0


class Server:
    """A server that runs.

    Attributes:
        process: the one that speaks HTTP; the workers are its children.
        log: the file that it logs to.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        self.url = self._find_url()
        self.target = Target.of_url(self.url)

    def _find_url(self) -> str:
        give_up_at = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up_at and self.process.poll() is None:
            if found := re.search(r"running on (http://\S+)", self.log.read_text()):
                return found[1]
            time.sleep(0.05)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")

    def status(self, path: str) -> int:
        """Of a GET, or 0 if there is no answer within two seconds."""
        try:
            return httpx.get(f"{self.url}{path}", timeout=2, trust_env=False).status_code
        except httpx.TransportError:
            return 0

    def wait_until_ready(self) -> float:
        """Seconds until `/readyz` said yes."""
        begin = time.monotonic()
        while self.status("/readyz") != 200:
            if self.process.poll() is not None or time.monotonic() > begin + START_SECONDS:
                raise RuntimeError(f"the server is not ready:\n{self.log.read_text()[-5000:]}")
            time.sleep(0.1)
        return time.monotonic() - begin

    def metrics(self) -> Mapping[str, float]:
        """Every series, as Prometheus writes it, with its value."""
        page = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).text
        lines = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
        return {series: float(value) for series, _, value in lines}

    def workers(self) -> list[psutil.Process]:
        """The processes that run models: the children of the server's fork server."""
        server = psutil.Process(self.process.pid)
        return [child for child in server.children(recursive=True) if child.ppid() != server.pid]


@contextmanager
def serving(
    store: Path, *, fault: Literal["kill", "memory", "header"] | None = None, **settings: object
) -> Iterator[Server]:
    """Run a server with the models of a store, ready; it is killed at the end with all of its workers.

    Args:
        fault: what is wrong with its device, see `_faults.py`.
        settings: by their names.
    """
    values = {"port": 0, "model_store": store, "device": "cpu", **settings}
    environment = {f"ROISERVE_{name.upper()}": str(value) for name, value in values.items()}
    command = ["-m", "service", "serve"] if fault is None else ["-m", "tests.load._faults", fault]
    with tempfile.TemporaryDirectory(prefix="roiserve-trial-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={"OMP_NUM_THREADS": "1", **os.environ, **environment, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        try:
            server = Server(process, log)
            server.wait_until_ready()
            yield server
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a server and its workers, unless they have ended."""
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in children:
            if child.is_running():
                child.kill()
    process.wait()
