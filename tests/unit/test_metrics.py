"""Metrics keep to Prometheus' conventions, and two apps in a process do not meet."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from shutil import which

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from service.metrics import Metrics
from service.structures import Verification, VerifiedValue
from tests.fakes import FAKE_INFO


def page(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def test_names_have_our_prefix_or_are_of_the_process() -> None:
    names = [line.split()[2] for line in page(Metrics(CollectorRegistry())).splitlines() if line.startswith("# TYPE")]
    assert {name.split("_")[0] for name in names} == {"roiserve", "process"}


def test_no_series_is_doubled_by_the_time_of_its_creation() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.requests.labels("/v1/detect", 200).inc()
    metrics.request_duration.labels("/v1/detect").observe(0.1)
    assert "_created" not in page(metrics)


def test_loaded_model_is_described_and_its_queue_asked_at_each_scrape() -> None:
    metrics = Metrics(CollectorRegistry())
    waiting = [100, 200]
    metrics.add_model(FAKE_INFO, queue_depth=lambda: len(waiting), queue_pixels=lambda: sum(waiting))
    assert 'roiserve_queue_depth{model="fake@1"} 2.0' in page(metrics)
    waiting.clear()
    assert 'roiserve_queue_depth{model="fake@1"} 0.0' in page(metrics)
    assert 'roiserve_queue_pixels{model="fake@1"} 0.0' in page(metrics)
    assert 'roiserve_model_ready{model="fake@1"} 1.0' in page(metrics)
    assert 'roi_op="roi_align"' in page(metrics)


def test_two_apps_count_apart() -> None:
    first, second = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    first.rejected.labels("overloaded").inc()
    assert 'roiserve_rejected_total{reason="overloaded"}' in page(first)
    assert 'roiserve_rejected_total{reason="overloaded"}' not in page(second)


def test_promtool_accepts_what_has_not_counted_yet() -> None:
    if which("promtool") is None:
        pytest.skip("promtool is not installed")
    text = page(Metrics(CollectorRegistry()))
    check = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def test_verification_is_told_as_a_share_of_what_is_tolerated_until_the_model_goes() -> None:
    metrics = Metrics(CollectorRegistry())
    values = {"boxes": VerifiedValue(0.005, 0.01), "scores": VerifiedValue(0.003, 0.001)}
    info = replace(FAKE_INFO, verification=Verification("openvino", "float32", values, 0.5))
    metrics.add_model(info, queue_depth=lambda: 0, queue_pixels=lambda: 0)
    assert 'roiserve_model_verification_ratio{model="fake@1",value="boxes"} 0.5' in page(metrics)
    assert 'roiserve_model_verification_ratio{model="fake@1",value="scores"} 3.0' in page(metrics)
    assert 'roiserve_overflowed_batches_total{model="fake@1"} 0.0' in page(metrics)
    metrics.observe("overflowed_batches", ["fake@1"], 1)
    assert 'roiserve_overflowed_batches_total{model="fake@1"} 1.0' in page(metrics)
    metrics.remove_model(info)
    assert "verification_ratio{" not in page(metrics)
