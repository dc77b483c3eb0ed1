"""`roiserve train` before and around the training itself, with a small network."""

from __future__ import annotations

import errno
import json
import tomllib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner, Result

from service.cli import app
from service.errors import DatasetError, ModelStoreError
from service.model_store.model_toml import ProvenanceTable, WeightsTable, read_model_config, write_model_toml
from service.training.run_folder import locked
from tests.coco_folder import write_coco_folder
from tests.unit.training.test_comparing import CONFIG


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with data/ and net.toml."""
    write_coco_folder(tmp_path / "data", train=4)
    write_model_toml(tmp_path / "net.toml", CONFIG, WeightsTable(sha256="0" * 64), ProvenanceTable())
    return tmp_path


def train(folder: Path, *more: str | Path, out: str = "store/discs/1") -> Result:
    quick = ["--epochs", 1, "--images-per-step", 2, "--crop-size", 96, "--warmup-steps", 0, "--device", "cpu"]
    command = ["train", "--data", folder / "data", "--model-config", folder / "net.toml", "--out", folder / out, *quick]
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(one) for one in (*command, *more)])


def edit(folder: Path, split: str, **tables: Any) -> None:
    path = folder / "data" / f"{split}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tables))


@pytest.mark.parametrize(
    "out", ["store/Discs/1", "store/discs/0", "store/discs/01", "store/discs/one", "store/-discs/1"]
)
def test_a_name_that_the_store_refuses_is_refused_before_training(folder: Path, out: str) -> None:
    with patch("service.training.loop.Trainer.run", side_effect=AssertionError("trained")):
        result = train(folder, out=out)
    assert isinstance(result.exception, ModelStoreError), result.output
    assert not (folder / "store").exists()


def test_a_disk_without_room_is_named_before_training(folder: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        patch("service.training.export.os.posix_fallocate", side_effect=full),
        patch("service.training.loop.Trainer.run", side_effect=AssertionError("trained")),
    ):
        result = train(folder)
    assert "cannot be written: No space left on device; the run needs" in str(result.exception)


def test_ctrl_c_says_how_to_go_on(folder: Path) -> None:
    with patch("service.training.loop.Trainer._take_step", side_effect=KeyboardInterrupt):
        result = train(folder)
    assert result.exit_code == 130
    assert "stopped in step 1 of 2; no state was written yet" in result.output


def test_a_second_run_is_refused_while_the_first_is_under_way(folder: Path) -> None:
    with locked(folder / "store/discs/.training-1"):
        result = train(folder)
        assert f"{folder}/store/discs/.training-1: another run is using it" in str(result.exception)
    with patch("service.training.loop.Trainer.run", side_effect=KeyboardInterrupt):
        assert train(folder).exit_code == 130


def test_training_on_some_labels_ends_with_a_card_that_says_what_was_left_out(folder: Path) -> None:
    for split in ("train", "val"):
        document = json.loads((folder / "data" / f"{split}.json").read_text())
        categories = [*document["categories"], {"id": 0, "name": "rod"}]
        extra = {**document["annotations"][0], "id": 999, "category_id": 0}
        edit(folder, split, categories=categories, annotations=[*document["annotations"], extra])
    refused = train(folder)
    assert isinstance(refused.exception, DatasetError)
    assert (
        "category 'rod' is not among the labels: disc; train, evaluate and data leave others out with --labels"
        in str(refused.exception)
    )
    result = train(folder, "--labels", "disc")
    assert result.exit_code == 0, result.output + repr(result.exception)
    model = folder / "store" / "discs" / "1"
    assert read_model_config(model / "model.toml").labels == ("disc",)
    assert "- train: left out: 1 annotations of categories that are no label" in (model / "README.md").read_text()
    assert (model / "training.csv").read_text().startswith("step,epoch,learning_rate,loss_")
    assert (model / "training.svg").read_text().startswith("<svg")
    # What a network with an RPN does not read, its file does not say.
    assert "proposals" not in tomllib.loads((model / "model.toml").read_text())


def test_a_broken_picture_of_val_is_found_before_the_first_epoch(folder: Path) -> None:
    picture = next((folder / "data" / "images").glob("val-*.png"))
    picture.write_bytes(picture.read_bytes()[:900])
    with patch("service.training.loop.Trainer.run", side_effect=AssertionError("trained")):
        result = train(folder)
    assert isinstance(result.exception, DatasetError)
    assert picture.name in str(result.exception)


def test_data_without_objects_are_refused(folder: Path) -> None:
    edit(folder, "val", annotations=[])
    assert "expected at least one object to train and evaluate on" in str(train(folder).exception)


def test_a_suggestion_is_written_and_never_over_another_file(folder: Path) -> None:
    config = folder / "fitted.toml"
    command = ["train", "--data", str(folder / "data"), "--suggest", "--model-config", str(config)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert read_model_config(config).architecture == "mask_rcnn"
    assert "exists already" in str(CliRunner().invoke(app, command).exception)


def test_what_is_missing_is_said(folder: Path) -> None:
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["train", "--data", str(folder / "data")])
    assert result.exit_code == 2
    assert "--model-config FILE and --out STORE/NAME/VERSION, or --suggest" in result.output
