"""The words of `roiserve bench`: what it refuses before anything is sent."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.commands._local_servers import local_server
from service.commands.bench import _hint_at_few, _Level
from service.errors import ServiceError
from service.load.summary import Summary
from tests.fakes import picture


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--concurrency", "1,none"], "expected numbers above 0"),
        (["--concurrency", "0"], "expected numbers above 0"),
        (["--rate", "nan"], "expected numbers above 0"),
        (["--rate", "5", "--find-knee"], "leave --rate out"),
        (["--option", "score_thresh"], "expected NAME=VALUE"),
    ],
)
def test_wrong_options_are_refused_by_name(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    command = ["bench", "--url", "http://127.0.0.1:1", "--images", str(tmp_path), *arguments]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected --url of a server that runs, or --find-workers"),
        (["--find-workers", "--url", "http://127.0.0.1:1"], "leave --url, --rate and"),
        (["--find-workers", "--find-knee"], "leave --url, --rate and"),
    ],
)
def test_a_server_that_runs_or_servers_of_its_own(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "--images", str(tmp_path), *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert words in result.output


async def test_a_local_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROISERVE_MODEL_STORE", str(tmp_path / "none"))
    with pytest.raises(ServiceError, match=r"with 2 workers ended with [12]:\n(.*\n)*.*none"):
        async with local_server(2, start_seconds=60):
            pass


class _Mortal(HTTPServer):
    """Serves one connection."""

    answers = 0

    def live(self) -> None:
        self.handle_request()
        self.server_close()


class _Answering(BaseHTTPRequestHandler):
    server: _Mortal
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.server.answers += 1
        self.close_connection = self.server.answers == 5

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_a_server_that_goes_ends_the_loads_and_what_there_is_is_shown(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    with _Mortal(("127.0.0.1", 0), _Answering) as server, ThreadPoolExecutor() as thread:
        thread.submit(server.live)
        url = f"http://127.0.0.1:{server.server_port}"
        command = [
            "--seconds",
            "0.3",
            "--warm-up-seconds",
            "0",
            "--concurrency",
            "1,2",
            "--json",
            str(tmp_path / "json"),
        ]
        result = CliRunner().invoke(app, ["bench", "--url", url, "--images", str(tmp_path), *command])
    assert (result.exit_code, "the server is gone" in result.output) == (1, True)
    [only] = json.loads((tmp_path / "json").read_text())["levels"]
    assert only["summary"]["outcomes"]["200"] == 4  # the first answer was not counted
    assert only["summary"]["outcomes"]["refused"] <= 4  # not as many as there can be in the time


def level(value: float, requests: int) -> _Level:
    latency_ms = dict.fromkeys(("p50", "p95", "p99", "max"), 1.0)
    return _Level("closed", value, Summary(10.0, requests, {"200": requests}, requests / 10, 0.0, latency_ms, 0.0))


def test_one_caller_is_no_callers() -> None:
    assert [str(level(value, 1)) for value in (1, 2)] == ["1 caller", "2 callers"]


def test_loads_of_few_requests_are_said_to_tell_little() -> None:
    """20 requests took 10 seconds, so 100 take 50."""
    assert _hint_at_few([level(1, 100), level(2, 500)]) is None
    hint = _hint_at_few([level(1, 20), level(2, 40), level(4, 100)])
    assert hint is not None
    assert hint.startswith("2 of 3 loads had fewer than 100 requests")
    assert hint.endswith("--seconds 50 would be enough")
