"""Settings come from the environment or as arguments, are checked, and hide their secrets."""

from __future__ import annotations

import os

import pytest
from pydantic import ValidationError

from service.settings import Settings, service_links, unknown_variables


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


def test_variables_of_vertex_ai_go_before_those_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROISERVE_PORT", "8000")
    monkeypatch.setenv("AIP_HTTP_PORT", "8080")
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "/v1/endpoints/1/deployedModels/2")
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/v1/endpoints/1/deployedModels/2:predict")
    settings = Settings()
    assert settings.port == 8080
    assert settings.health_route == "/v1/endpoints/1/deployedModels/2"
    assert settings.predict_route == "/v1/endpoints/1/deployedModels/2:predict"


@pytest.mark.parametrize("route", ["predict", "/{name}", "/a b", "/"])
def test_route_that_is_no_path_is_refused(route: str) -> None:
    with pytest.raises(ValidationError):
        Settings(predict_route=route)


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROISERVE_MODELS", "nuclei, blood-cells@2,")
    monkeypatch.setenv("ROISERVE_API_KEYS", "one,two")
    settings = Settings()
    assert settings.models == ("nuclei", "blood-cells@2")
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]


def test_empty_list_of_models_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROISERVE_MODELS", "")
    assert Settings().models == ()


@pytest.mark.parametrize("variable", ["ROISERVE_API_KEYS", "ROISERVE_ADMIN_KEYS"])
@pytest.mark.parametrize("value", ["", " ", ",", " , "])
def test_keys_that_are_set_but_empty_are_refused(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty secret from a vault must not open the service to everyone."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValidationError, match="expected at least one key, got none"):
        Settings()


@pytest.mark.parametrize(("value", "words"), [(b"\xff", "UTF-8"), (b"a\x01", "control characters")])
def test_keys_that_no_request_could_carry_are_refused(
    value: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROISERVE_API_KEYS", os.fsdecode(value))
    with pytest.raises(ValidationError, match=words):
        Settings()


KUBERNETES = {
    "ROISERVE_SERVICE_HOST": "10.96.0.7",
    "ROISERVE_SERVICE_PORT": "8000",
    "ROISERVE_SERVICE_PORT_HTTP": "8000",
    "ROISERVE_PORT": "tcp://10.96.0.7:8000",
    "ROISERVE_PORT_8000_TCP": "tcp://10.96.0.7:8000",
    "ROISERVE_PORT_8000_TCP_PROTO": "tcp",
    "ROISERVE_PORT_8000_TCP_PORT": "8000",
    "ROISERVE_PORT_8000_TCP_ADDR": "10.96.0.7",
}
"""What a pod gets for a Service that is named roiserve."""


def test_variables_of_a_kubernetes_service_named_roiserve_set_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)
    assert Settings() == Settings(port=8000, host="127.0.0.1")
    assert service_links(KUBERNETES) == sorted(KUBERNETES)
    assert list(unknown_variables(KUBERNETES)) == []


def test_a_port_that_an_operator_set_is_no_service_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROISERVE_PORT", "9000")
    assert Settings().port == 9000
    assert service_links({"ROISERVE_PORT": "9000", "OTHER_PORT": "tcp://10.96.0.7:1"}) == []


def test_unknown_variables_are_found_with_what_was_meant() -> None:
    environment = {
        "ROISERVE_MAX_BACH_SIZE": "3",
        "ROISERVE_API_KEY": "x",
        "ROISERVE_ZZZ": "1",
        "ROISERVE_PORT": "1",
        "ROISERVE_WEIGHTS_BASE_URL": "x",
        "PATH": "x",
    }
    assert list(unknown_variables(environment)) == [
        ("ROISERVE_API_KEY", "ROISERVE_API_KEYS"),
        ("ROISERVE_MAX_BACH_SIZE", "ROISERVE_MAX_BATCH_SIZE"),
        ("ROISERVE_ZZZ", None),
    ]


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


@pytest.mark.parametrize("sizes", ["1344x", "1344x800,0x32"])
def test_buckets_are_sizes(sizes: str) -> None:
    with pytest.raises(ValidationError, match="expected sizes such as 1344x800"):
        Settings(batch_policy="bucketed", bucket_sizes=sizes)  # type: ignore[arg-type]  # as in a variable


def test_buckets_want_the_policy_that_uses_them() -> None:
    with pytest.raises(ValidationError, match="expected none unless batch_policy is bucketed"):
        Settings(bucket_sizes="1344x800")  # type: ignore[arg-type]  # as in a variable
    settings = Settings(batch_policy="bucketed", bucket_sizes="1344x800")  # type: ignore[arg-type]  # likewise
    assert settings.buckets == ((800, 1344),)


def test_the_admin_port_is_another_port() -> None:
    with pytest.raises(ValidationError, match="expected another port than that of the API"):
        Settings(port=9000, admin_port=9000)
    assert Settings(port=9000, admin_port=9001).admin_port == 9001


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices_are_written_as_torch_writes_them(device: str) -> None:
    assert Settings(device=device).device == device


def test_every_field_has_help() -> None:
    assert all(field.description for field in Settings.model_fields.values())
