from __future__ import annotations

import csv
import errno
import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from service.errors import ServiceError
from service.modeling.config import ModelConfig
from service.training.dataset import load_coco
from service.training.loop import Progress, TrainConfig, Trainer
from tests.coco_folder import write_coco_folder
from tests.tiny_models import LOSSES, given_proposals

TINY = ModelConfig.model_validate(
    {
        "architecture": "mask_rcnn",
        "labels": ["disc"],
        "backbone": {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16, "norm": "batch_norm"},
        "transform": {"min_size": 96, "max_size": 128},
        "anchors": {"sizes": [[16], [24], [32], [64], [128]]},
        "rpn": {"pre_nms_top_n_train": 100, "post_nms_top_n_train": 50},
        "roi": {"box_head_channels": 32, "mask_head_channels": [16], "batch_size_per_image": 32},
    }
)
CONFIG = TrainConfig(epochs=2, images_per_step=4, crop_size=96, warmup_steps=2, evaluate_every=2)


def trainer(
    folder: Path,
    state: str,
    config: TrainConfig = CONFIG,
    network: ModelConfig = TINY,
    *,
    workers: int = 2,
    start: dict[str, torch.Tensor] | None = None,
) -> Trainer:
    if not folder.joinpath("train.json").exists():
        write_coco_folder(folder)
    return Trainer(
        model_config=network,
        train_config=config,
        train=load_coco(folder / "train.json"),
        val=load_coco(folder / "val.json"),
        state_path=folder / state / "state.pt",
        device=torch.device("cpu"),
        workers=workers,
        initial_weights=start,
    )


class Interrupted(Exception):
    """Raised by a test in the middle of a run, as a kill would end it."""


def test_losses_are_named_and_fall(tmp_path: Path) -> None:
    totals: list[float] = []

    def on_step(progress: Progress) -> None:
        assert set(progress.losses) == set(LOSSES)
        totals.append(sum(progress.losses.values()))

    trainer(tmp_path / "data", "state", CONFIG.model_copy(update={"epochs": 15, "evaluate_every": 15})).run(
        on_step=on_step
    )
    assert len(totals) == 30
    assert sum(totals[-6:]) < 0.7 * sum(totals[:6])


def test_a_run_that_was_killed_and_resumed_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "data", "whole").run()

    def kill(progress: Progress) -> None:
        if progress.step == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        trainer(tmp_path / "data", "killed").run(on_step=kill, save_every_steps=2)
    second = trainer(tmp_path / "data", "killed")
    steps: list[int] = []
    resumed = second.run(on_step=lambda progress: steps.append(progress.step))
    assert steps == [3, 4]
    for key, value in whole.weights.items():
        torch.testing.assert_close(resumed.weights[key], value, msg=key)


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    first = trainer(tmp_path / "data", "a").run()
    second = trainer(tmp_path / "data", "b", CONFIG.model_copy(update={"seed": 1})).run()
    assert not torch.equal(first.weights["rpn.head.cls_logits.weight"], second.weights["rpn.head.cls_logits.weight"])


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "data", "state").run()
    with pytest.raises(ServiceError, match="state of a run with another configuration"):
        trainer(tmp_path / "data", "state", CONFIG.model_copy(update={"epochs": 3})).run()


def test_a_state_of_other_data_or_other_start_weights_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "data", "state").run()
    start = {"backbone.body.conv1.weight": torch.zeros(8, 3, 7, 7)}
    with pytest.raises(ServiceError, match="a run with another start weights"):
        trainer(tmp_path / "data", "state", start=start).run()
    # As many pictures and objects, but one box is another.
    path = tmp_path / "data" / "train.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["bbox"][2] -= 1
    path.write_text(json.dumps(document))
    with pytest.raises(ServiceError, match="a run with another training set"):
        trainer(tmp_path / "data", "state").run()


def test_a_damaged_state_is_named_and_kept(tmp_path: Path) -> None:
    state = tmp_path / "data" / "state" / "state.pt"
    write_coco_folder(tmp_path / "data")
    state.parent.mkdir()
    state.write_bytes(b"PK damaged")
    with pytest.raises(ServiceError, match=r"cannot be read: .*remove it to start anew"):
        trainer(tmp_path / "data", "state").run()
    assert state.exists()


def test_a_disk_that_fills_up_ends_the_run_with_one_line(tmp_path: Path) -> None:
    run = trainer(tmp_path / "data", "state")
    with (
        patch("service.training.loop.torch.save", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(ServiceError, match="cannot be written: No space left on device; that of step 0 is kept"),
    ):
        run.run(save_every_steps=1)
    assert not list((tmp_path / "data" / "state").glob("*"))


def test_history_has_a_row_a_save_and_goes_on_where_the_run_does(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "data", "whole", workers=7)  # how many threads prepare pictures changes nothing
    whole.run(save_every_steps=1)

    def kill(progress: Progress) -> None:
        if progress.step == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        trainer(tmp_path / "data", "killed").run(on_step=kill, save_every_steps=1)
    second = trainer(tmp_path / "data", "killed")
    started: list[int] = []
    second.run(on_start=started.append, save_every_steps=1)
    assert started == [2]
    assert second.history.csv() == whole.history.csv()
    lines = list(csv.DictReader((tmp_path / "data" / "killed" / "training.csv").read_text().splitlines()))
    assert [(line["step"], line["epoch"]) for line in lines] == [("1", "1"), ("2", "1"), ("3", "2"), ("4", "2")]
    assert {*LOSSES, "boxes_ap", "masks_ap50", "learning_rate"} <= set(lines[0])
    assert [bool(line["boxes_ap"]) for line in lines] == [False, False, False, True]


def test_a_learning_rate_out_of_bounds_ends_with_a_clear_error(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1e8, "warmup_steps": 0, "epochs": 10})
    with pytest.raises(ServiceError, match="no longer finite"):
        trainer(tmp_path / "data", "state", config).run()


@pytest.mark.parametrize("architecture", ["fast_rcnn", "rcnn"])
def test_a_network_whose_callers_give_the_proposals_learns_from_those_of_a_search(
    architecture: str, tmp_path: Path
) -> None:
    losses: list[float] = []

    def on_step(progress: Progress) -> None:
        assert set(progress.losses) == {"loss_classifier", "loss_box_reg"}
        losses.append(sum(progress.losses.values()))

    config = CONFIG.model_copy(update={"warmup_steps": 0, "learning_rate": 3e-3})
    best = trainer(tmp_path / "data", "state", config, given_proposals(architecture)).run(on_step=on_step)
    assert len(losses) == 4  # 2 epochs of 8 pictures, 4 a step
    assert losses[-1] < losses[0]
    assert (best.epoch, best.evaluation.num_images) == (2, 2)
    searched = {path.stem for path in (tmp_path / "data" / "state").rglob("proposals-*/*.npy")}
    assert searched == {str(image_id) for image_id in range(1, 9)}
