"""Each benchmark runs, quickly and on tiny sizes: its figures mean nothing then, but all of them are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cluster, cores, host, model, ops, request, serve


def tables(folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    document = json.loads((folder / f"{name}.json").read_text())
    return {table["title"]: table["rows"] for table in document["tables"]}


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision:DeprecationWarning")
def test_ops(tmp_path: Path) -> None:
    ops.main(quick=True, threads=torch.get_num_threads(), pictures=tmp_path / "none", out=tmp_path)
    operators, decoding, resizing, pngs, masks = tables(tmp_path, "ops").values()
    assert all(float(row["largest difference"]) <= 1e-5 for row in operators + resizing)
    assert [row["picture"] for row in resizing] == ["480p"]
    assert [row["picture"] for row in decoding] == ["480p", "480p, progressive"]
    [png] = pngs
    assert png["ours MB"] <= 1.1 * png["level 3 MB"]
    assert [(row["objects"], row["IoU"]) for row in masks] == [(1, "1.00000"), (20, "1.00000"), (100, "1.00000")]


def test_model(tmp_path: Path) -> None:
    model.main(quick=True, threads=torch.get_num_threads(), engines="eager", out=tmp_path)
    found = tables(tmp_path, "model")
    assert set(found) == set(model.TITLES.values())
    assert all([row["model"] for row in rows] == ["blood-cells", "nuclei"] for rows in found.values())


def test_request(tmp_path: Path) -> None:
    request.main(quick=True, threads=torch.get_num_threads(), engine="eager", out=tmp_path)
    [rows] = tables(tmp_path, "request").values()
    assert [(row["model"], row["engine"]) for row in rows] == [
        ("blood-cells", "eager, float32"),
        ("nuclei", "eager, float32"),
    ]


def test_serve(tmp_path: Path) -> None:
    serve.main(quick=True, threads=torch.get_num_threads(), out=tmp_path)
    found = tables(tmp_path, "serve")
    loads, ratios, idle = (found[title] for title in (serve.LOADS, serve.SATURATED, serve.AT_REST))
    assert {row["errors"] for row in loads} == {"0.0 %"}
    assert [row["callers"] for row in loads] == [1, 2, 1, 2]
    assert [row["traffic"] for row in ratios] == ["one size", "mixed sizes"]
    assert len(idle) == 1


def test_host(tmp_path: Path) -> None:
    host.main(quick=True, out=tmp_path)
    instant, timed = (tables(tmp_path, "host")[title] for title in (host.INSTANT, host.TIMED))
    assert [row["masks"] for row in instant] == [row["masks"] for row in timed] == ["none", "rle"]
    assert all(0 < row["answers / possible"] <= 1.05 for row in timed)


def test_cluster(tmp_path: Path) -> None:
    cluster.main(simulate_only=True, quick=True, out=tmp_path)
    steady, step = (tables(tmp_path, "cluster")[title] for title in (cluster.SIMULATED, cluster.STEP))
    assert [row["machines"] for row in steady] == [1, 1, 1, 4, 4, 4]
    assert max(row["replicas ready"] for row in step) > step[0]["replicas ready"]


def test_cores(tmp_path: Path) -> None:
    cores.main(simulate_only=True, quick=True, milliseconds=60, parallel=0.9, out=tmp_path)
    [rows] = tables(tmp_path, "cores").values()
    assert [(row["workers"], row["threads each"]) for row in rows] == [(1, 8), (2, 4), (4, 2), (8, 1)]
    # Amdahl: 6 ms do not shrink, 54 ms do. One worker cannot keep up with 60 % of what eight can do.
    assert [float(row["one picture ms"]) for row in rows] == pytest.approx([12.75, 19.5, 33, 60], rel=0.01)
    assert [row["p99 ms"] == "–" for row in rows] == [True, False, False, False]


def test_one_picture_is_timed_on_a_core(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.cores", "--time-on", str(min(os.sched_getaffinity(0)))]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(cores.__file__).parents[1])
    assert float(run.stdout.split()[-1]) > 0
