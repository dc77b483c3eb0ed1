"""`roiserve models verify` says how far an engine lies from the plain network, and fails if that is too far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner, Result

from service.commands.models import models_app
from service.inference import verification
from tests.tiny_models import given_proposals, store_untrained


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    store_untrained(root, "given", given_proposals("fast_rcnn"))
    return root


def run(store: Path, *options: str) -> Result:
    return CliRunner().invoke(models_app, ["verify", "given", "--store", str(store), "--device", "cpu", *options])


def test_differences_are_printed_beside_what_is_tolerated(store: Path) -> None:
    result = run(store, "--engine", "eager", "--precision", "bfloat16")
    assert result.exit_code == 0, result.output
    boxes, scores, last = result.stdout.splitlines()[1:]
    assert boxes.split()[0] == "boxes"
    assert boxes.split()[-2:] == ["8", "px"]
    assert scores.split()[0] == "scores"
    assert last.startswith("passed: given@1 on cpu is run by eager in bfloat16 (")


def test_the_same_as_json(store: Path) -> None:
    document: dict[str, Any] = json.loads(run(store, "--engine", "eager", "--precision", "bfloat16", "--json").stdout)
    assert document["engine"] == document["verification"]["engine"] == "eager"
    assert document["verification"]["passed"] is True
    assert document["verification"]["masks"] is None
    assert document["verification"]["boxes"]["tolerance"] == 8


def test_the_reference_has_nothing_to_be_held_to(store: Path) -> None:
    result = run(store, "--engine", "eager")
    assert result.exit_code == 0
    assert "is the reference for the others" in result.stdout


def test_one_that_does_not_pass_under_auto_says_what_runs_instead_and_fails(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    none = {"boxes": 0.0, "scores": 0.0, "masks": 0.0}
    with patch.dict(verification.TOLERANCES, {"float32": none}):
        result = run(store, "--engine-cache-dir", str(tmp_path))
    assert result.exit_code == 1
    assert "openvino in float32 does not pass; given@1 on cpu is run by eager in float32 instead" in result.stderr
