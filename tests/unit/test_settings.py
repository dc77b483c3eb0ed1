"""Settings come from the environment or as arguments, are checked, and hide their secrets."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from service.settings import Settings


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ROISERVE_{name.upper()}", raising=False)


def test_defaults_serve_this_machine_only() -> None:
    assert (Settings().host, Settings().port) == ("127.0.0.1", 8000)


def test_environment_sets_fields_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROISERVE_PORT", "9000")
    monkeypatch.setenv("ROISERVE_LOG_FORMAT", "json")
    settings = Settings(port=9001)
    assert (settings.port, settings.log_format) == (9001, "json")


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROISERVE_MODELS", "nuclei, blood-cells@2,")
    monkeypatch.setenv("ROISERVE_API_KEYS", "one,two")
    settings = Settings()
    assert settings.models == ("nuclei", "blood-cells@2")
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]


def test_empty_list_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROISERVE_API_KEYS", "")
    assert Settings().api_keys == ()


def test_keys_are_not_printed() -> None:
    assert "hush" not in repr(Settings(api_keys="hush", admin_keys="hush"))  # type: ignore[arg-type]  # as in a variable


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70000),
        ("max_batch_size", 0),
        ("max_queue_size", 0),
        ("device", "tpu"),
        ("precision", "float8"),
        ("engine", "magic"),
        ("batch_policy", "stacked"),
        ("body_timeout_seconds", 0),
        ("drain_timeout_seconds", -1),
        ("log_level", "loud"),
        ("hosst", "x"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValidationError, match=name):
        Settings(**{name: value})  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices_are_written_as_torch_writes_them(device: str) -> None:
    assert Settings(device=device).device == device


def test_every_field_has_help() -> None:
    assert all(field.description for field in Settings.model_fields.values())
