"""Each benchmark runs, quickly and on tiny sizes: its figures mean nothing then, but all of them are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cluster, model, ops, request, serve


def tables(folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    document = json.loads((folder / f"{name}.json").read_text())
    return {table["title"]: table["rows"] for table in document["tables"]}


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision:DeprecationWarning")
def test_ops(tmp_path: Path) -> None:
    ops.main(quick=True, threads=torch.get_num_threads(), pictures=tmp_path / "none", out=tmp_path)
    operators, decoding, resizing, masks = tables(tmp_path, "ops").values()
    assert all(float(row["largest difference"]) <= 1e-5 for row in operators + resizing)
    assert [row["picture"] for row in resizing] == ["480p"]
    assert [row["picture"] for row in decoding] == ["480p", "480p, progressive"]
    assert [(row["objects"], row["IoU"]) for row in masks] == [(1, "1.00000"), (20, "1.00000"), (100, "1.00000")]


def test_model(tmp_path: Path) -> None:
    model.main(quick=True, threads=torch.get_num_threads(), engines="eager", out=tmp_path)
    found = tables(tmp_path, "model")
    assert set(found) == set(model.TITLES.values())
    assert all([row["model"] for row in rows] == ["blood-cells", "nuclei"] for rows in found.values())


def test_request(tmp_path: Path) -> None:
    request.main(quick=True, threads=torch.get_num_threads(), engine="eager", out=tmp_path)
    [rows] = tables(tmp_path, "request").values()
    assert [(row["model"], row["engine"]) for row in rows] == [("blood-cells", "eager"), ("nuclei", "eager")]


def test_serve(tmp_path: Path) -> None:
    serve.main(quick=True, threads=torch.get_num_threads(), out=tmp_path)
    found = tables(tmp_path, "serve")
    loads, ratios, idle = (found[title] for title in (serve.LOADS, serve.SATURATED, serve.AT_REST))
    assert {row["errors"] for row in loads} == {"0.0 %"}
    assert [row["callers"] for row in loads] == [1, 2, 1, 2]
    assert [row["traffic"] for row in ratios] == ["one size", "mixed sizes"]
    assert len(idle) == 1


def test_cluster(tmp_path: Path) -> None:
    cluster.main(simulate_only=True, quick=True, out=tmp_path)
    steady, step = (tables(tmp_path, "cluster")[title] for title in (cluster.SIMULATED, cluster.STEP))
    assert [row["machines"] for row in steady] == [1, 1, 1, 4, 4, 4]
    assert max(row["replicas ready"] for row in step) > step[0]["replicas ready"]
