"""What the package is installed, started and shipped with: pins, Makefile, image, compose file, health check."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyOptions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
}
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def tool(name: str) -> str:
    """The path of an installed program; skips the test without it."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run make as a person would, not as a child of the make that runs these tests."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run([tool("make"), *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def required(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """What an installed package needs on this machine; nothing for one that is not installed."""
    try:
        requirements = distribution(name).requires or []
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, requirements):
        if not requirement.marker or any(requirement.marker.evaluate({"extra": e}) for e in ["", *extras]):
            yield requirement


def test_every_direct_and_indirect_dependency_is_pinned() -> None:
    waiting = [Requirement(line) for lines in [PROJECT["dependencies"], *EXTRAS.values()] for line in lines]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, extras := frozenset(requirement.extras)) not in seen:
            seen.add((name, extras))
            waiting += required(name, extras)
            assert requirement.specifier.contains(PINS[name], prereleases=True), f"{requirement} against {PINS[name]}"


def test_everything_imported_is_declared() -> None:
    """Packages that come along with others may leave with them; the lower halves of FastAPI and Pydantic will not."""
    extras = [lines for name, lines in EXTRAS.items() if name != "dev"]
    lines = [line for lines in [PROJECT["dependencies"], *extras] for line in lines]
    declared = {canonicalize_name(Requirement(line).name) for line in lines} | {"starlette", "pydantic-core"}
    trees = [ast.parse(path.read_text()) for path in (ROOT / "service").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    outside = {name.split(".")[0] for name in imported} - sys.stdlib_module_names - {"service"}
    carriers = packages_distributions()
    assert {
        name for name in outside if not declared & {canonicalize_name(carrier) for carrier in carriers[name]}
    } == set()


def test_makefile_says_which_python_it_needs(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    run = make("setup", "PYTHON=no-such-python", folder=tmp_path)
    assert run.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in run.stderr


def test_make_serve_passes_on_only_what_was_chosen() -> None:
    assert "roiserve serve --host '::1' --port '9000'" in make("-n", "serve", "HOST=::1", "PORT=9000").stdout
    assert "--port" not in make("-n", "serve").stdout


def test_dockerfile_passes_hadolint() -> None:
    run = subprocess.run([tool("hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_dockerfile_copies_only_what_the_builder_is_sent() -> None:
    """No Docker is needed to see that a COPY would fail: its source is missing, or kept out by .dockerignore."""
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    sources = {source for line in copies for source in line.split()}
    assert sources == sent
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_image_holds_the_fastest_engine_of_the_cpu() -> None:
    """What the Dockerfile's own program lists is what it installs: all dependencies, OpenVINO, and timm's backbones."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    match = re.search(r'^RUN python -c "(.+)"\s+> requirements.txt', lines, flags=re.MULTILINE)
    assert match is not None
    listed = subprocess.run([sys.executable, "-c", match[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines() == [*PROJECT["dependencies"], *EXTRAS["openvino"], *EXTRAS["timm"]]


@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules rules.yml", "test rules rules_test.yml"]
)
def test_prometheus_accepts_its_configuration_and_its_alerts_fire_when_they_should(command: str) -> None:
    run = subprocess.run(
        [tool("promtool"), *command.split()], cwd=ROOT / "docker/prometheus", capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_alert_was_seen_to_fire() -> None:
    """By a test of promtool, and each also to stay silent."""
    rules = yaml.safe_load((ROOT / "docker/prometheus/rules.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load((ROOT / "docker/prometheus/rules_test.yml").read_text())["tests"]
    checks = [check for test in tests for check in test["alert_rule_test"]]
    assert {check["alertname"] for check in checks if check.get("exp_alerts")} == alerts
    assert {check["alertname"] for check in checks if not check.get("exp_alerts")} == alerts


def test_prometheus_scrapes_the_service_of_the_compose_file() -> None:
    configuration = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())
    [target] = configuration["scrape_configs"][0]["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert f"EXPOSE {port}" in (ROOT / "Dockerfile").read_text()
    for service in ("roiserve", "roiserve-gpu"):
        assert COMPOSE["services"][service]["ports"][0].endswith(f":{port}")
        assert COMPOSE["services"][service]["networks"]["default"]["aliases"] == [name]


def test_compose_mounts_what_exists_and_pins_what_it_pulls() -> None:
    services = COMPOSE["services"].values()
    volumes = [volume.split(":")[0] for service in services for volume in service["volumes"]]
    assert all(
        (ROOT / volume).exists() if volume.startswith(".") else volume in COMPOSE["volumes"] for volume in volumes
    )
    pulled = [service["image"] for service in services if "build" not in service]
    assert all(re.search(r":v?\d+\.\d+", image) for image in pulled)


def test_compose_starts_the_service_without_being_told_a_profile() -> None:
    defaults = dict(line.split("=") for line in (ROOT / ".env").read_text().splitlines() if line[:1] != "#")
    starts = {
        name
        for name, service in COMPOSE["services"].items()
        if defaults["COMPOSE_PROFILES"] in service.get("profiles", ["cpu"])
    }
    assert starts == {"roiserve", "prometheus", "grafana"}


def test_compose_file_is_what_the_specification_accepts() -> None:
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "docker-compose.yml").read_text())
    read = PyOptions(apply_merge=True).from_yaml
    assert read(text).service_names() == list(COMPOSE["services"])
    for right, wrong in (("read_only:", "readonly:"), ("cap_drop: [ALL]", "cap_drop: ALL"), ("memory:", "memry:")):
        with pytest.raises(ValueError):
            read(text.replace(right, wrong))


def test_compose_bounds_and_confines_every_service() -> None:
    for name, service in COMPOSE["services"].items():
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name


def test_the_example_names_every_variable_of_the_compose_file_with_its_default() -> None:
    used = dict(re.findall(r"\$\{(\w+):-([^}]+)\}", (ROOT / "docker-compose.yml").read_text())[::-1])
    shown = dict(re.findall(r"^(\w+)=(.+)$", (ROOT / ".env.example").read_text(), flags=re.MULTILINE))
    assert shown == used | {"COMPOSE_PROFILES": "cpu"}


@pytest.mark.parametrize(("status", "exit_code"), [(200, 0), (503, 1)])
def test_health_check_follows_the_answer(status: int, exit_code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        monkeypatch.setenv("ROISERVE_PORT", str(server.server_port))
        assert health_check() == exit_code
        thread.join()


def test_health_check_asks_the_default_port_where_kubernetes_set_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def refuse(address: tuple[str, int], *_: object) -> None:
        asked.append(address)
        raise ConnectionRefusedError("nobody listens")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setenv("ROISERVE_PORT", "tcp://10.96.0.7:8000")
    assert health_check() == 1
    assert asked == [("127.0.0.1", 8000)]


def test_health_check_fails_where_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        monkeypatch.setenv("ROISERVE_PORT", str(server.server_port))
    assert health_check() == 1


def health_check() -> int:
    """Run `docker/healthcheck.py` as a container does; returns its exit status."""
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / "docker/healthcheck.py"), run_name="__main__")
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code
