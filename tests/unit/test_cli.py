"""The command line as a newcomer meets it: version, help in plain words, completion, and errors without tracebacks."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer
from typer.testing import CliRunner

from service import cli
from service.cli import app, main

COMMANDS = (
    ["serve"],
    ["detect"],
    ["train"],
    ["evaluate"],
    ["compare"],
    ["bench"],
    ["models", "list"],
    ["models", "show"],
    ["models", "import"],
    ["models", "pull"],
    ["models", "verify"],
)


def invoke(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_version_is_the_packages() -> None:
    assert invoke("--version") == f"roiserve {version('roiserve')}\n"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_and_without_names_of_types(command: list[str]) -> None:
    output = invoke(*command, "-h")
    assert output == invoke(*command, "--help")
    assert f"Example: roiserve {' '.join(command)} " in output
    # The types of arguments and of its own --help are typer's.
    options = [line for line in output.partition("─ Options ─")[2].splitlines() if "--help" not in line]
    assert re.findall(r"<[a-z]+(?: range|\[\w+\])?>", "".join(options).replace("<name>/<version>", "")) == []


def test_help_of_serve_shows_choices_under_headings() -> None:
    output = invoke("serve", "--help")
    assert "default )" not in " ".join(output.split())
    assert re.search(r"--engine\s+auto\|eager\|compiled\|graphs\|openvino\s", output)
    assert re.search(r"--allow-roi-op-override\s+true\|false\s", output)
    assert re.search(r"--drain-delay-seconds\s+SECONDS\s", output)
    headings = re.findall(r"^╭─ ([A-Z][\w ]+) ─", output, flags=re.MULTILINE)
    assert headings[:3] == ["Options", "Address", "Models"]
    assert "Keys" in headings


@pytest.mark.parametrize(("words", "offered"), [("roiserve de", "detect"), ("roiserve serve --engine ea", "eager")])
def test_shells_complete_commands_and_choices(words: str, offered: str) -> None:
    number = str(len(words.split()) - 1)
    environment = {**os.environ, "_ROISERVE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": number}
    program = "from service.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.stdout.split() == [offered]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_cannot_be_written_is_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise OSError(number, os.strerror(number), "out/a.json")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"roiserve: out/a.json: cannot be written: {os.strerror(number)}\n"


def test_a_warning_has_its_fields_though_most_commands_configure_no_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("service.somewhere")
    monkeypatch.setattr(logger, "propagate", False)  # pytest's own handlers
    fields = {"fields": {"file": "cache/a", "reason": "No space left on device"}}
    monkeypatch.setattr(cli, "app", lambda **_: logger.warning("cannot keep a compiled part", extra=fields))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    main()
    line = capsys.readouterr().err
    assert 'cannot keep a compiled part file=cache/a reason="No space left on device"' in line


def test_a_character_that_the_terminal_lacks_ends_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(cli, "app", lambda **_: print("0.4 \N{EN DASH}"))
    monkeypatch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    main()
    assert out.buffer.getvalue() == b"0.4 ?\n"


def test_a_new_option_has_a_metavar_whatever_its_type() -> None:
    from service.commands._help import metavar

    assert [metavar(kind) for kind in (bool, int | None, list[str], typer.Typer)] == ["", "NUMBER", "TEXT", "VALUE"]
