"""`roiserve bench` as a user runs it, against a service with a fake model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.fakes import picture
from tests.integration.conftest import Live

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for index in range(4):
        (tmp_path / "pictures" / f"{index}.png").write_bytes(picture(red=50 * index + 50, width=40 + 30 * index))
    return tmp_path / "pictures"


def command(url: str, pictures: Path, *arguments: str) -> list[str]:
    loads = ["--url", url, "--images", str(pictures), "--seconds", "0.3", "--warm-up-seconds", "0"]
    return [sys.executable, "-m", "service", "bench", *loads, *arguments]


def run(url: str, pictures: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(url, pictures, *arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )


def test_loads_knee_and_suggestion_are_shown_and_written(live: Live, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    before = live.metric('roiserve_requests_total{route="/v1/detect",status="200"}')
    done = run(live.url, pictures, "--concurrency", "1,2", "--find-knee", "--masks", "none", "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert [(level["mode"], level["value"]) for level in report["levels"]] == [("closed", 1), ("closed", 2)]
    assert report["knee"]["rate"] >= 0
    assert set(report["suggestion"]) == {"max_batch_size", "max_queue_size", "request_timeout_ms"}
    assert "knee:" in done.stdout
    assert "--max-queue-size" in done.stdout
    # Every answer was counted, the first one as well, which only asks whether the rest makes sense.
    answered = sum(one["summary"]["outcomes"].get("200", 0) for one in [*report["levels"], *report["steps"]])
    assert live.metric('roiserve_requests_total{route="/v1/detect",status="200"}') - before == answered + 1


def test_limits_that_are_not_kept_are_said_and_exit_with_1(live: Live, pictures: Path) -> None:
    done = run(live.url, pictures, "--rate", "50", "--max-p99-ms", "0.001", "--json", "-")
    assert done.returncode == 1
    assert "is above 0.001 ms" in done.stderr
    assert json.loads(done.stdout)["levels"][0]["summary"]["error_rate"] == 0
    (pictures / "broken.png").write_bytes(b"nonsense")
    done = run(live.url, pictures, "--rate", "50", "--max-error-rate", "0.01")
    assert done.returncode == 1
    assert "error rate" in done.stderr
    assert "×415" in done.stdout


def test_what_is_wrong_with_every_request_is_said_at_once(serve: Callable[..., Live], pictures: Path) -> None:
    live = serve(api_keys="right")
    without_key = run(live.url, pictures)
    assert (without_key.returncode, without_key.stderr.count("\n")) == (1, 1)
    assert "the server answers 401" in without_key.stderr
    wrong_model = run(live.url, pictures, "--api-key", "right", "--model", "unknown")
    assert "the server answers 404: no model 'unknown'" in wrong_model.stderr
    assert run(live.url, pictures, "--api-key", "right").returncode == 0
    assert "no answer from the server: refused" in run("http://127.0.0.1:9", pictures).stderr


def test_interrupt_shows_what_there_is(live: Live, pictures: Path) -> None:
    endless = command(live.url, pictures, "--seconds", "600", "--concurrency", "2", "--json", "-")
    before = live.metric('roiserve_requests_total{route="/v1/detect",status="200"}')
    # What a shell starts in the background ignores interrupts, and its children inherit that.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        endless, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen
    ) as running:
        while live.metric('roiserve_requests_total{route="/v1/detect",status="200"}') < before + 10:
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        out, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    report = json.loads(out)
    assert report["is_complete"] is False
    assert report["levels"][0]["summary"]["outcomes"]["200"] >= 5
