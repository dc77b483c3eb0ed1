"""The bundled models score alike by every engine, on real pictures and through the command that anyone can run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.devices.cpu import CpuDevice
from service.inference.engines import choosing
from service.inference.engines.compiled import CompiledNetwork
from tests.shared_data import require, write_slice

STORE = Path(__file__).resolve().parents[2] / "model_store"
PICTURES = 4


def evaluated(model: str, engine: str, data: Path) -> dict[str, Any]:
    """What `roiserve evaluate --json` prints."""
    command = ["evaluate", "--model", model, "--store", str(STORE), "--data", str(data), "--device", "cpu"]
    run = CliRunner().invoke(app, [*command, "--engine", engine, "--json"])
    assert run.exit_code == 0, run.output
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


@pytest.mark.parametrize(
    ("model", "data", "size"), [("nuclei", "nuclei", (256, 256)), ("blood-cells", "bccd", (480, 640))]
)
def test_every_engine_gives_the_average_precision_of_eager(
    model: str, data: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("HOME", str(tmp_path))  # where compiled parts go
    annotations = write_slice(require(data), tmp_path / "data", train=0, val=PICTURES, size=size) / "val.json"
    expected = evaluated(model, "eager", annotations)
    # `compiled` as it is, but for the code, for which there is no time here.
    by_torch = partial(CompiledNetwork, backend="eager")
    with patch.object(CpuDevice, "compiler_problem", None), patch.object(choosing, "CompiledNetwork", by_torch):
        for engine in ("openvino", "compiled"):
            found = evaluated(model, engine, annotations)
            for kind in ("boxes", "masks"):
                assert (found[kind] is None) == (expected[kind] is None)
                if found[kind] is not None:
                    assert expected[kind]["ap"] > 0.2
                    assert found[kind]["ap"] == pytest.approx(expected[kind]["ap"], abs=1e-3)
                    assert found[kind]["ap50"] == pytest.approx(expected[kind]["ap50"], abs=1e-3)
