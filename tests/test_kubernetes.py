"""The Kubernetes files are what the API accepts, build with kustomize, and agree with the server and its image."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docker/kubernetes"
# Of operators, whose schemas do not come with Kubernetes.
OPERATORS = {"InferenceService", "PodMonitor", "ScaledObject", "Kustomization", "Component"}


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def kustomize(overlay: Path) -> list[dict[str, Any]]:
    """Build an overlay; skips the test without the program."""
    program = shutil.which("kustomize", path=f"{ROOT / '.tools'}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("kustomize is not installed")
    run = subprocess.run([program, "build", str(overlay)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return documents(run.stdout)


FILES = [path for path in sorted(FOLDER.rglob("*.yaml")) if path.name not in ("prometheus-adapter.yaml", "gpu.yaml")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_file_is_what_the_schema_of_its_kind_accepts(path: Path) -> None:
    for document in documents(path.read_text()):
        if document["kind"] not in OPERATORS:
            kubernetes_validate.validate(document, "1.33", strict=True)


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_overlay_builds_to_what_the_schemas_accept(overlay: str) -> None:
    built = kustomize(FOLDER / "overlays" / overlay)
    for document in built:
        kubernetes_validate.validate(document, "1.33", strict=True)
    kinds = {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "HorizontalPodAutoscaler"}
    assert {document["kind"] for document in built} == kinds


@pytest.mark.parametrize("component", ["keda", "prometheus-operator"])
def test_components_build_into_an_overlay(component: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    path = tmp_path / "kubernetes/overlays/cpu/kustomization.yaml"
    path.write_text(path.read_text().replace("components/autoscaling", f"components/{component}"))
    assert {document["kind"] for document in kustomize(path.parent)} & {"ScaledObject", "PodMonitor"}


def test_gpu_overlay_adds_a_gpu_and_keeps_the_rest() -> None:
    def container(overlay: str) -> dict[str, Any]:
        [deployment] = [one for one in kustomize(FOLDER / "overlays" / overlay) if one["kind"] == "Deployment"]
        [found] = deployment["spec"]["template"]["spec"]["containers"]
        return dict(found)

    cpu, gpu = container("cpu"), container("gpu")
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "ROISERVE_DEVICE", "value": "cuda"} in gpu["env"]
    assert [one for one in gpu["env"] if one["name"] != "ROISERVE_DEVICE"] == cpu["env"]
    assert {key: value for key, value in gpu.items() if key not in ("env", "resources")} == {
        key: value for key, value in cpu.items() if key not in ("env", "resources")
    }


OPERATORS_CHECK = """
import { readFileSync } from "fs";
import { ScaledObject } from "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject";
import { PodMonitor } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PodMonitor";
const document = JSON.parse(readFileSync(0));
new { ScaledObject, PodMonitor }[document.kind](document).validate();
"""


@pytest.mark.parametrize(
    ("name", "key", "wrong"),
    [
        ("keda/scaledobject.yaml", "maxReplicaCount", "ten"),
        ("prometheus-operator/podmonitor.yaml", "podMetricsEndpoints", "metrics"),
    ],
)
def test_operators_accept_what_is_for_them(name: str, key: str, wrong: str) -> None:
    schemas = ROOT / ".tools/operators"
    if not (schemas / "installed").exists():
        pytest.skip("the operators' schemas are not installed: tests/install_tools.sh")
    [document] = documents((FOLDER / "components" / name).read_text())

    def check() -> subprocess.CompletedProcess[str]:
        command = ["node", "--input-type=module", "--eval", OPERATORS_CHECK]
        return subprocess.run(command, cwd=schemas, input=json.dumps(document), capture_output=True, text=True)

    run = check()
    assert run.returncode == 0, run.stderr
    document["spec"][key] = wrong
    assert f"{key} must be" in check().stderr


def pod_specs() -> list[tuple[str, dict[str, Any]]]:
    [deployment] = documents((FOLDER / "base/deployment.yaml").read_text())
    [inference] = documents((FOLDER / "kserve/inferenceservice.yaml").read_text())
    return [("deployment", deployment["spec"]["template"]["spec"]), ("kserve", inference["spec"]["predictor"])]


@pytest.mark.parametrize(("name", "spec"), pod_specs(), ids=lambda value: value if isinstance(value, str) else "")
def test_pods_agree_with_the_server_and_its_image(name: str, spec: dict[str, Any]) -> None:
    [container] = spec["containers"]
    variables = {one["name"]: one["value"] for one in container["env"]}
    settings = Settings(**{name.removeprefix("ROISERVE_").lower(): value for name, value in variables.items()})
    assert spec["terminationGracePeriodSeconds"] > settings.drain_delay_seconds + settings.drain_timeout_seconds
    assert settings.drain_timeout_seconds * 1000 > settings.request_timeout_ms
    assert spec["enableServiceLinks"] is False
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"EXPOSE {container['ports'][0]['containerPort']}" in dockerfile
    assert container["securityContext"]["readOnlyRootFilesystem"]
    writable = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert writable == {"/var/cache/roiserve", "/tmp"}
    user = (spec.get("securityContext", {}) | container["securityContext"])["runAsUser"]
    assert f"USER {user}:{user}" in dockerfile


def test_selectors_find_the_pods() -> None:
    [deployment] = documents((FOLDER / "base/deployment.yaml").read_text())
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    [service] = documents((FOLDER / "base/service.yaml").read_text())
    [budget] = documents((FOLDER / "base/poddisruptionbudget.yaml").read_text())
    [policy] = documents((FOLDER / "base/networkpolicy.yaml").read_text())
    [monitor] = documents((FOLDER / "components/prometheus-operator/podmonitor.yaml").read_text())
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    assert monitor["spec"]["selector"]["matchLabels"] == labels


def test_autoscalers_ask_for_a_metric_that_exists() -> None:
    # tests/test_docs.py looks that each metric named under docker/ exists; here, that all ask for the same one.
    texts = [path.read_text() for path in FOLDER.rglob("*.yaml")]
    asking = [text for text in texts if "AverageValue" in text]
    assert len(asking) == 3
    assert all("roiserve_queue_pixels" in text for text in asking)
