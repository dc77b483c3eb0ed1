"""`roiserve train` and `evaluate`, run as a user would, on a slice of real data."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared_data import require, write_slice

ROISERVE = [sys.executable, "-m", "service"]
REPOSITORY = Path(__file__).resolve().parents[2]
MODEL_TOML = """
architecture = "mask_rcnn"
labels = ["nucleus"]
[backbone]
name = "narrow_resnet18_fpn"
width = 16
out_channels = 32
norm = "batch_norm"
[transform]
min_size = 256
max_size = 512
[anchors]
sizes = [[8], [16], [32], [64], [128]]
[rpn]
pre_nms_top_n_train = 300
post_nms_top_n_train = 200
[roi]
box_head_channels = 64
mask_head_channels = [32]
batch_size_per_image = 64
"""
STEPS = re.compile(r"step (\d+)/60 .*?loss_objectness (\S+)")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*ROISERVE, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture
def training(tmp_path: Path) -> list[str | Path]:
    """A command that takes 60 steps on 8 pictures."""
    data = write_slice(require("nuclei"), tmp_path / "data", train=8, val=2, size=(256, 256))
    config = tmp_path / "model.toml"
    config.write_text(MODEL_TOML)
    out = tmp_path / "store" / "cells" / "1"
    command: list[str | Path] = ["train", "--data", data, "--model-config", config, "--out", out, "--epochs", "15"]
    command += ["--images-per-step", "2", "--crop-size", "128", "--warmup-steps", "5", "--evaluate-every", "15"]
    return [*command, "--threads", "2"]


@pytest.mark.timeout(900)
def test_training_killed_in_the_middle_goes_on_and_ends_with_a_model_that_can_be_evaluated(
    training: list[str | Path], tmp_path: Path
) -> None:
    first = subprocess.Popen(
        [*ROISERVE, *map(str, training)], cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert first.stderr is not None
    losses: dict[int, float] = {}
    for line in first.stderr:
        if found := STEPS.search(line):
            losses[int(found[1])] = float(found[2])
            if int(found[1]) >= 30:
                os.kill(first.pid, signal.SIGKILL)
                break
    first.stderr.close()
    assert first.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "store" / "cells" / "1").exists()

    second = run(*training)
    assert second.returncode == 0, second.stderr
    assert re.search(r"resuming at step [234]0 of 60", second.stderr)
    resumed = {int(step): float(loss) for step, loss in STEPS.findall(second.stderr)}
    assert min(resumed) in (30, 40)  # the state was last written after step 20 or later
    assert resumed[60] < losses[10]

    folder = tmp_path / "store" / "cells" / "1"
    assert {path.name for path in folder.iterdir()} == {
        "model.toml",
        "weights.safetensors",
        "README.md",
        "training.csv",
        "training.svg",
    }
    assert list(folder.parent.iterdir()) == [folder]  # the state of the run is gone
    assert "AP50" in (folder / "README.md").read_text()

    val = tmp_path / "data" / "val.json"
    evaluated = run("evaluate", "--model", "cells", "--store", tmp_path / "store", "--data", val, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    figures = json.loads(evaluated.stdout)
    assert set(figures) >= {"model", "boxes", "masks"}
    assert 0 <= figures["boxes"]["ap50"] <= 1


def test_bad_annotations_are_reported_before_training_starts(training: list[str | Path], tmp_path: Path) -> None:
    path = tmp_path / "data" / "train.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["bbox"] = [250, 0, 50, 10]
    document["images"][0]["file_name"] = "nowhere.png"
    path.write_text(json.dumps(document))
    refused = run(*training)
    assert refused.returncode == 1
    assert "2 problem(s)" in refused.stderr
    assert "reaches outside its image of 256 x 256" in refused.stderr
    assert "no file nowhere.png" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_model_is_never_overwritten(training: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "store" / "cells" / "1").mkdir(parents=True)
    refused = run(*training)
    assert refused.returncode == 1
    assert "exists already" in refused.stderr
