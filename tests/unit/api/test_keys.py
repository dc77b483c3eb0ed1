"""Keys come from settings and files, and a file can be read again without ever opening the service by mistake."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from service.api.keys import Keys
from service.errors import ServiceError
from service.settings import Settings


def test_without_keys_everyone_may_detect_and_nobody_load() -> None:
    keys = Keys(Settings())
    assert not keys.are_needed
    assert not keys.has_administrators


def test_keys_of_files_count_beside_those_of_variables(tmp_path: Path) -> None:
    (tmp_path / "users").write_text("beta\n\n  ключ \r\n")
    (tmp_path / "admins").write_text("root")
    keys = Keys(
        Settings(
            api_keys="alpha",  # type: ignore[arg-type]  # as in a variable
            api_keys_file=tmp_path / "users",
            admin_keys_file=tmp_path / "admins",
        )
    )
    assert keys.are_needed
    assert [keys.is_known(key.encode()) for key in ("alpha", "beta", "ключ", "root", "", "gamma")] == [
        True,
        True,
        True,
        True,
        False,
        False,
    ]
    assert [keys.is_administrators(key) for key in (b"root", b"alpha")] == [True, False]


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old")
    keys = Keys(Settings(api_keys_file=file))
    file.write_text("new")
    keys.reload()
    assert (keys.is_known(b"old"), keys.is_known(b"new")) == (False, True)


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\n", b"x\n" * 600_000])
def test_a_file_without_usable_keys_ends_the_start_and_changes_nothing_later(
    tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("good")
    settings = Settings(api_keys_file=file)
    keys = Keys(settings)
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ServiceError, match="key file"):
        Keys(settings)
    with caplog.at_level(logging.INFO):
        keys.reload()
    assert keys.is_known(b"good")
    assert "the keys stay as they were" in caplog.text


def test_the_log_says_who_may_call_what_and_no_key(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Keys(Settings(admin_keys="hush")).tell()  # type: ignore[arg-type]  # as in a variable
    [record] = caplog.records
    fields = getattr(record, "fields", {})
    assert fields == {
        "v1": "open to everyone",
        "load_and_unload": "with an administrator's key",
        "users": 0,
        "administrators": 1,
    }
