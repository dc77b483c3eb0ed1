"""`roiserve serve`: every setting is a flag with help, and what is wrong is said by name."""

from __future__ import annotations

import logging
import re

import pytest
import typer
from typer.testing import CliRunner

from service.commands.serve import _tell_of_variables, read_settings, serve_command
from service.settings import Settings


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(serve_command())
    result = CliRunner(env={"COLUMNS": "400", "TERM": "dumb"}).invoke(app, arguments)
    return result.exit_code, result.output


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_a_flag_whose_help_names_its_variable(name: str) -> None:
    _, output = invoke("--help")
    assert re.search(rf"--{name.replace('_', '-')}[\s,].*ROISERVE_{name.upper()}\b", output)


def test_help_states_ranges_and_defaults() -> None:
    _, output = invoke("--help")
    assert "(ROISERVE_PORT; at least 0; at most 65535; default 8000)" in output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "x"], "--port or ROISERVE_PORT"),
        (["--max-batch-size", "0"], "--max-batch-size or ROISERVE_MAX_BATCH_SIZE"),
        (["--engine", "magic"], "'eager'"),
        (["--api-keys", " , "], "ROISERVE_API_KEYS: expected at least one key, got none; unset it"),
        (["--device", "tpu"], "ROISERVE_DEVICE: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_what_is_wrong_is_said_by_name_and_ends_with_2(flags: list[str], words: str) -> None:
    status, output = invoke(*flags)
    assert status == 2
    assert words in output


def test_a_key_is_not_repeated_where_logs_would_keep_it() -> None:
    status, output = invoke("--admin-keys", "hush\x01")
    assert status == 2
    assert "ROISERVE_ADMIN_KEYS: expected keys without control characters" in output
    assert "hush" not in output


def test_a_password_within_an_address_is_not_repeated() -> None:
    status, output = invoke("--label-studio-url", "http://me:hush@studio:8080")
    assert status == 2
    assert "ROISERVE_LABEL_STUDIO_URL: expected an address" in output
    assert "hush" not in output


def test_variables_that_set_nothing_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ROISERVE_MAX_BACH_SIZE", "3")
    monkeypatch.setenv("ROISERVE_PORT", "tcp://10.96.0.7:8000")
    with caplog.at_level(logging.INFO):
        _tell_of_variables()
    assert [(record.levelname, getattr(record, "fields", None)) for record in caplog.records] == [
        ("INFO", {"variables": "ROISERVE_PORT"}),
        ("WARNING", {"variable": "ROISERVE_MAX_BACH_SIZE", "did_you_mean": "ROISERVE_MAX_BATCH_SIZE"}),
    ]


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROISERVE_PORT", "1")
    monkeypatch.setenv("ROISERVE_HOST", "0.0.0.0")
    settings = read_settings({"port": "2", "api_keys": "a,b"})
    assert (settings.port, settings.host, len(settings.api_keys)) == (2, "0.0.0.0", 2)
