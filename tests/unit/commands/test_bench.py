"""The words of `roiserve bench`: what it refuses before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app
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
