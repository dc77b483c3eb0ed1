"""A log line is an event with keys, one line long whatever a caller sent, and names the request it is about."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from typing import Literal

import pytest

from service.logs import configure_logging, request_id_context

LogFormat = Literal["text", "json"]


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("service")
    handlers, levels = root.handlers, (root.level, ours.level)
    yield
    root.handlers = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    logging.captureWarnings(False)


def written(capsys: pytest.CaptureFixture[str], log_format: LogFormat, *arguments: object, **options: object) -> str:
    configure_logging(log_format=log_format, log_level="info")
    logging.getLogger("service.test").info(*arguments, **options)  # type: ignore[arg-type]
    return capsys.readouterr().err


def test_json_line_has_the_event_and_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    line = json.loads(written(capsys, "json", "model ready", extra={"fields": {"model": "a@1", "seconds": 0.5}}))
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "service.test",
        "event": "model ready",
        "model": "a@1",
        "seconds": 0.5,
    }


def test_text_line_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    line = written(capsys, "text", "model ready", extra={"fields": {"model": "a@1"}})
    assert line.endswith("Z info service.test model ready model=a@1\n")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_request_id_stands_on_the_lines_of_its_request(
    capsys: pytest.CaptureFixture[str], log_format: LogFormat
) -> None:
    token = request_id_context.set("abc")
    try:
        assert "abc" in written(capsys, log_format, "decoding")
    finally:
        request_id_context.reset(token)
    assert "request_id" not in written(capsys, log_format, "decoding")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_callers_cannot_write_lines_of_their_own(capsys: pytest.CaptureFixture[str], log_format: LogFormat) -> None:
    evil = "/x\n2026-01-01T00:00:00Z info admin logged in"
    assert written(capsys, log_format, "request", extra={"fields": {"path": evil}}).count("\n") == 1


def test_json_keeps_a_traceback_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = written(capsys, "json", "failed", exc_info=ValueError("why"))
    assert line.count("\n") == 1
    assert "ValueError: why" in json.loads(line)["traceback"]


def test_debugging_is_about_this_package_only(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log_format="text", log_level="debug")
    logging.getLogger("service.test").debug("ours")
    logging.getLogger("PIL").debug("theirs")
    assert "ours" in (lines := capsys.readouterr().err)
    assert "theirs" not in lines


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_a_library_logs_or_warns_of_is_one_sane_line(
    capsys: pytest.CaptureFixture[str], log_format: LogFormat
) -> None:
    line = written(capsys, log_format, "two\n  lines \x1b[31m \udcff", extra={"fields": {"file": "a\udcff"}})
    assert line.count("\n") == 1
    assert "two; lines \\x1b[31m \\udcff" in line.replace("\\\\", "\\")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)  # so that it is done anew, within what pytest does with warnings
        configure_logging(log_format=log_format, log_level="info")
        warnings.warn("odd file", stacklevel=1)
    line = capsys.readouterr().err
    assert "warning py.warnings" in line or json.loads(line)["logger"] == "py.warnings"
    assert line.count("\n") == 1


def test_a_megabyte_in_a_message_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    line = written(capsys, "json", "refused", extra={"fields": {"detail": "x" * 1_000_000}})
    assert len(line) < 5000
    assert json.loads(line)["detail"].endswith("… (1000000 characters)")


def test_uvicorns_own_account_of_its_start_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log_format="text", log_level="info")
    for message in ("Started server process [1]", "Uvicorn running on http://127.0.0.1:1"):
        logging.getLogger("uvicorn.error").info(message)
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(" info uvicorn Uvicorn running on http://127.0.0.1:1")
