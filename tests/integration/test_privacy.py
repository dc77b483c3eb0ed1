"""Nothing is sent and nothing of a third party is written into the home folder, whatever runs a model by OpenVINO.

Python tells every process here whom it calls: a `sitecustomize` that the interpreter finds first writes it down, also
in the worker processes. What a library did in C without Python would not be seen.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.coco_folder import write_coco_folder
from tests.tiny_models import store_untrained
from tests.unit.training.test_comparing import CONFIG

pytest.importorskip("openvino")

ROOT = Path(__file__).parents[2]
WATCH = """
import os, sys
LOG = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
NAMES = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyname_ex", "socket.gethostbyaddr")
def watch(event, arguments):
    is_sending = event in ("socket.connect", "socket.sendto", "socket.sendmsg")
    if event in NAMES or is_sending and arguments[0].family != 1:  # not to another process of ours
        what = arguments[1:] if is_sending else arguments
        os.write(LOG, f"{{event}} {{what}}\\n".encode())
sys.addaudithook(watch)
os.write(LOG, b"watching\\n")
"""


class Watched:
    """A place where commands run, with a home of their own."""

    def __init__(self, folder: Path) -> None:
        self.home, self.log = folder / "home", folder / "log"
        self.home.mkdir()
        (folder / "sitecustomize.py").write_text(WATCH.format(log=str(self.log)))
        self.environment = os.environ | {
            "HOME": str(self.home),
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            "ROISERVE_ENGINE_CACHE_DIR": str(folder / "engines"),
            "ROISERVE_MODEL_STORE": str(ROOT / "model_store"),
            "ROISERVE_MODELS": "blood-cells",
            "ROISERVE_DEVICE": "cpu",
        }
        self.environment.pop("XDG_CACHE_HOME", None)

    def run(self, *command: str) -> None:
        run = subprocess.run(
            [sys.executable, *command], cwd=self.home.parent, env=self.environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr

    @property
    def calls(self) -> list[str]:
        """What the processes did, but for starting."""
        lines = self.log.read_text().splitlines()
        assert "watching" in lines
        return [line for line in lines if line != "watching"]


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_the_watch_sees_a_name_that_is_looked_up(watched: Watched) -> None:
    watched.run("-c", "import socket\ntry: socket.getaddrinfo('name.invalid', 80)\nexcept OSError: pass")
    assert len(watched.calls) == 1
    assert "name.invalid" in watched.calls[0]


def test_importing_the_engine_calls_nobody(watched: Watched) -> None:
    watched.run("-c", "import service.inference.engines.openvino")
    assert watched.calls == []
    assert list(watched.home.iterdir()) == []


def test_detecting_calls_nobody(watched: Watched) -> None:
    watched.run("-m", "service", "detect", str(ROOT / "examples" / "blood-smear-1.jpg"))
    assert watched.calls == []
    assert list(watched.home.iterdir()) == []


def test_quantising_calls_nobody(watched: Watched, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    write_coco_folder(tmp_path / "data", train=1, val=1)
    store_untrained(tmp_path / "store", "discs", CONFIG)
    data = ("--data", str(tmp_path / "data" / "train.json"), "--store", str(tmp_path / "store"))
    watched.run("-m", "service", "quantize", "--model", "discs", *data, "--max-ap-loss", "100")
    assert watched.calls == []
    assert list(watched.home.iterdir()) == []
    assert (tmp_path / "store" / "discs" / "2" / "int8.json").exists()


def test_serving_calls_nobody(watched: Watched) -> None:
    command = [sys.executable, "-m", "service", "serve", "--port", "0"]
    server = subprocess.Popen(
        command, cwd=watched.home.parent, env=watched.environment, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        url = ""
        lines = []
        for line in server.stderr:
            lines.append(line)
            if "http://" in line and not url:
                url = "http://" + line.split("http://")[1].split()[0].strip('"')
            if url and "ready" in line:
                break
        picture = (ROOT / "examples" / "blood-smear-1.jpg").read_bytes()
        with httpx.Client(base_url=url, timeout=120) as client:
            while client.get("/readyz").status_code != 200:
                pass
            answer = client.post("/v1/detect", content=picture, headers={"Content-Type": "image/jpeg"})
        assert answer.status_code == 200, answer.text
        server.send_signal(signal.SIGTERM)
        server.communicate()
    finally:
        server.kill()
        server.wait()
    assert [call for call in watched.calls if "127.0.0.1" not in call] == []
    assert list(watched.home.iterdir()) == []
