"""`roiserve detect` as a user runs it, with a small untrained model: files in, JSON and drawn pictures out."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from service.cli import main
from service.model_store.model_toml import ProvenanceTable
from service.model_store.store import ModelStore
from service.modeling.build import build_model
from service.modeling.config import ModelConfig

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig.model_validate(
    {
        "architecture": "mask_rcnn",
        "labels": ["thing"],
        "backbone": {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16, "norm": "batch_norm"},
        "transform": {"min_size": 64, "max_size": 128},
        "roi": {"box_head_channels": 16, "mask_head_channels": [8]},
        "detections": {"score_thresh": 0.0, "detections_per_img": 3},
    }
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ModelStore(tmp_path / "store").write_model(
        "tiny",
        1,
        config=CONFIG,
        state_dict=build_model(CONFIG).state_dict(),
        provenance=ProvenanceTable(),
        readme="",
    )
    pictures = tmp_path / "pictures" / "more"
    pictures.mkdir(parents=True)
    Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).save(pictures / "a.png")
    Image.effect_mandelbrot((60, 90), (-1, -1, 1, 1), 50).save(pictures.parent / "b.jpg")
    (pictures / "notes.txt").write_text("no picture")
    return tmp_path


def run_alone(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    command = [sys.executable, "-m", "service", "detect", "--store", str(folder / "store"), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, for torch takes long to import."""
    command = ["roiserve", "detect", "--store", str(folder / "store"), *arguments]
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    with (
        chdir(REPOSITORY),
        patch.object(sys, "argv", command),
        patch.dict(os.environ),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert isinstance(ended.value.code, int)
    for one in (out, err):
        one.seek(0)
    return subprocess.CompletedProcess(command, ended.value.code, out.read(), err.read())


def test_a_folder_becomes_a_line_of_json_and_a_drawn_picture_for_each_picture(folder: Path) -> None:
    done = run_alone(folder, str(folder / "pictures"), "--json", "--out", str(folder / "drawn"))
    assert done.returncode == 0, done.stderr
    documents = {Path(one["file"]).name: one for one in map(json.loads, done.stdout.splitlines())}
    assert set(documents) == {"a.png", "b.jpg"}
    assert documents["a.png"]["image"] == {"width": 90, "height": 60, "orientation_applied": False}
    assert len(documents["a.png"]["detections"]) == 3
    assert documents["a.png"]["detections"][0]["mask"]["size"] == [60, 90]
    with Image.open(folder / "drawn" / "b.drawn.png") as drawn:
        assert drawn.size == (60, 90)
    stored = json.loads((folder / "drawn" / "b.json").read_text())
    assert stored["detections"] == documents["b.jpg"]["detections"]


def test_two_pictures_that_would_be_written_to_one_place_are_refused(folder: Path) -> None:
    (folder / "other").mkdir()
    shutil.copy(folder / "pictures" / "b.jpg", folder / "other")
    done = run(folder, str(folder / "pictures"), str(folder / "other"), "--out", str(folder / "drawn"))
    assert done.returncode == 1
    assert "would both be written to" in done.stderr
    assert not (folder / "drawn").exists()


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--device", "foo"], "ROISERVE_DEVICE"), (["--out", "README.md"], "expected a folder")]
)
def test_wrong_options_are_one_line_each(folder: Path, arguments: list[str], words: str) -> None:
    done = run(folder, str(folder / "pictures"), *arguments)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_file_is_named_and_the_others_are_answered(folder: Path) -> None:
    done = run(folder, str(folder / "pictures" / "more" / "notes.txt"), str(folder / "pictures" / "b.jpg"))
    assert done.returncode == 1
    assert "notes.txt" in done.stderr
    assert "1 of 2 files failed" in done.stderr
    assert done.stdout == f"{folder}/pictures/b.jpg: 3 thing\n"


def test_pipes_and_folders_are_no_pictures_and_names_need_not_be_text(folder: Path) -> None:
    pictures = folder / "pictures"
    os.mkfifo(pictures / "pipe.png")
    (pictures / "folder.png").mkdir()
    (pictures / "link.png").symlink_to("nowhere")
    shutil.copy(pictures / "b.jpg", pictures / os.fsdecode(b"b\xff.jpg"))
    done = run(folder, str(pictures), "--json", "--out", str(folder / "drawn"), "--coco", str(folder / "coco.json"))
    assert "1 of 4 files failed" in done.stderr
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    names = {Path(one["file"]).name: one.get("error", {}).get("detail") for one in documents}
    assert names == {
        "a.png": None,
        "b.jpg": None,
        "b\ufffd.jpg": None,
        "link.png": "cannot be read: No such file or directory",
    }
    assert {one["image_id"] for one in json.loads((folder / "coco.json").read_bytes())} == names.keys() - {"link.png"}


def test_pictures_that_differ_in_their_suffix_alone_keep_it(folder: Path) -> None:
    shutil.copy(folder / "pictures" / "b.jpg", folder / "pictures" / "more" / "a.jpg")
    # What an earlier run has drawn beside the pictures is left out.
    shutil.copy(folder / "pictures" / "more" / "a.png", folder / "pictures" / "b.drawn.png")
    assert run(folder, str(folder / "pictures"), "--out", str(folder / "pictures")).returncode == 0
    made = {str(path.relative_to(folder / "pictures")) for path in (folder / "pictures").rglob("*.json")}
    assert made == {"b.json", "more/a.png.json", "more/a.jpg.json"}


def test_what_is_not_there_is_named_and_the_others_are_answered(folder: Path) -> None:
    done = run(folder, "nowhere.png", str(folder / "pictures" / "b.jpg"), "--json")
    assert done.returncode == 1
    assert "nowhere.png: cannot be read: No such file or directory" in done.stderr
    assert "1 of 2 files failed" in done.stderr
    missing, answered = map(json.loads, done.stdout.splitlines())
    assert missing["error"]["detail"] == "cannot be read: No such file or directory"
    assert len(answered["detections"]) == 3


def test_what_is_wrong_with_all_is_said_before_a_model_is_loaded(folder: Path) -> None:
    done = run(folder, "nowhere.png")
    assert (done.returncode, done.stderr) == (1, "roiserve: no such file: nowhere.png\n")
    done = run(folder, str(folder / "pictures"), "--store", str(folder / "elsewhere"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"roiserve: no model store at {folder}/elsewhere: no such folder; name another one")


@pytest.mark.parametrize(("out", "words"), [("/proc/drawn", "cannot be written: No such file"), ("full", "No space")])
def test_a_place_that_cannot_be_written_is_one_line(folder: Path, out: str, words: str) -> None:
    if out == "full":
        (folder / "full").mkdir()
        (folder / "full" / "b.drawn.png").symlink_to("/dev/full")
    done = run(folder, str(folder / "pictures" / "b.jpg"), "--out", out if out[0] == "/" else str(folder / out))
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_model_is_one_line(folder: Path) -> None:
    done = run(folder, str(folder / "pictures"), "--model", "other")
    assert done.returncode == 1
    assert "no model 'other'" in done.stderr
    assert "tiny@1" in done.stderr
    assert "Traceback" not in done.stderr
