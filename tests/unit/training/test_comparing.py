"""One network under several operators: what differs between the rows is the operator and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from service.inference.predictor import Predictor
from service.modeling.config import ModelConfig
from service.structures import Detections, Prediction, Query
from service.training.comparing import COLUMNS, Run, busy_note, markdown, measure, retrain, table
from service.training.dataset import CocoDataset, load_coco
from service.training.evaluation import AveragePrecision, Evaluation
from service.training.loop import TrainConfig, evaluation_info
from service.training.proposals import ProposalCache
from tests.coco_folder import write_coco_folder
from tests.tiny_models import given_proposals

CONFIG = ModelConfig.model_validate(
    {
        "architecture": "mask_rcnn",
        "labels": ["disc"],
        "backbone": {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16, "norm": "batch_norm"},
        "transform": {"min_size": 96, "max_size": 128},
        "anchors": {"sizes": [[16], [24], [32], [64], [128]]},
        "rpn": {"pre_nms_top_n_train": 100, "post_nms_top_n_train": 50, "post_nms_top_n_test": 50},
        "roi": {
            "box_head_channels": 32,
            "mask_head_channels": [16],
            "batch_size_per_image": 32,
            "mask": {"op": "roi_pool"},
        },
    }
)
QUICK = TrainConfig(epochs=1, images_per_step=4, crop_size=96, warmup_steps=0, evaluate_every=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_coco_folder(tmp_path / "data", train=4)


@pytest.fixture
def val(folder: Path) -> CocoDataset:
    return load_coco(folder / "val.json")


def figures(ap: float) -> AveragePrecision:
    return AveragePrecision(ap, ap + 0.2, ap + 0.1, float("nan"), ap, ap, {}, {})


def run(op: str, ap: float, *, milliseconds: float = 10.0) -> Run:
    return Run(op, Evaluation(figures(ap), figures(ap - 0.1), num_images=2, max_detections=100), milliseconds)


def test_table_has_a_row_for_each_operator_of_boxes_then_of_masks() -> None:
    assert table([run("roi_pool", 0.3), run("roi_align", 0.4, milliseconds=12.34)]) == [
        ("roi_pool", "boxes", "30.0", "50.0", "40.0", "–", "30.0", "30.0", "10.0"),
        ("roi_align", "boxes", "40.0", "60.0", "50.0", "–", "40.0", "40.0", "12.3"),
        ("roi_pool", "masks", "20.0", "40.0", "30.0", "–", "20.0", "20.0", "10.0"),
        ("roi_align", "masks", "30.0", "50.0", "40.0", "–", "30.0", "30.0", "12.3"),
    ]


def test_several_seeds_give_mean_and_standard_deviation() -> None:
    # 29, 30 and 31: mean 30, sample standard deviation 1.
    rows = table([run("roi_pool", ap, milliseconds=10.0) for ap in (0.29, 0.30, 0.31)])
    assert rows[0][:3] == ("roi_pool", "boxes", "30.0 ± 1.0")
    assert rows[0][-1] == "10.0 ± 0.0"
    assert len(rows) == 2


def test_model_without_masks_has_no_rows_of_them() -> None:
    boxes_only = replace(run("roi_pool", 0.3), evaluation=Evaluation(figures(0.3), None, 2, 100))
    assert [row[1] for row in table([boxes_only])] == ["boxes"]


def test_markdown_says_the_command() -> None:
    lines = markdown([run("roi_pool", 0.3)], title="cells", command="roiserve compare --model cells").splitlines()
    assert lines[0] == "# cells"
    assert lines[2] == f"| {' | '.join(COLUMNS)} |"
    assert lines[4] == "| roi_pool | boxes | 30.0 | 50.0 | 40.0 | – | 30.0 | 30.0 | 10.0 |"
    assert "roiserve compare --model cells" in lines


def test_times_of_a_busy_machine_are_remarked() -> None:
    assert busy_note(0.3, 2) is None
    remark = busy_note(6.0, 2)
    assert remark is not None
    page = markdown([run("roi_pool", 0.3)], title="cells", command="roiserve compare", remark=remark)
    assert "The machine was busy when this began (load 6.0 on 2 cores)" in page


class Recorder:
    """Finds nothing, and remembers under which operator it was asked."""

    def __init__(self) -> None:
        self.info = evaluation_info(CONFIG)
        self.ops: list[str | None] = []

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        self.ops += [query.options.roi_op for query in queries]
        boxes = np.zeros((0, 4), np.float32)
        return [Prediction(Detections(boxes, np.zeros(0, np.int64), boxes[:, 0]), {}, batch_size=len(queries))]


def test_every_picture_is_asked_under_the_operator_after_one_to_warm_up(val: CocoDataset) -> None:
    recorder, advanced = Recorder(), []
    measured = measure(recorder, val, roi_op="roi_warp", advance=lambda: advanced.append(1))
    assert recorder.ops == ["roi_warp"] * (1 + len(val))
    assert len(advanced) == len(val)
    assert (measured.roi_op, measured.evaluation.boxes.ap) == ("roi_warp", 0.0)
    assert 0 < measured.milliseconds_per_image < 1000


def test_retrained_networks_begin_alike_and_pool_with_their_operator_in_both_branches(
    folder: Path, val: CocoDataset, tmp_path: Path
) -> None:
    def trained(op: str, state: str, learning_rate: float = 1e-3) -> Predictor:
        return retrain(
            CONFIG,
            roi_op=op,
            train_config=QUICK.model_copy(update={"learning_rate": learning_rate}),
            train=load_coco(folder / "train.json"),
            val=val,
            state_path=tmp_path / state / "state.pt",
            device=torch.device("cpu"),
        )

    pool, align = (trained(op, f"{op}-still", learning_rate=1e-12) for op in ("roi_pool", "roi_align"))
    heads = align._model.roi_heads
    assert (heads.box_roi_pool.roi.op, heads.mask_roi_pool.roi.op) == ("roi_align", "roi_align")
    weight = "roi_heads.box_head.fc6.weight"
    torch.testing.assert_close(pool._model.state_dict()[weight], align._model.state_dict()[weight])
    moved = trained("roi_pool", "moved")
    assert not torch.equal(moved._model.state_dict()[weight], pool._model.state_dict()[weight])


def test_a_network_whose_callers_give_the_proposals_is_retrained_and_measured_with_those_of_a_search(
    folder: Path, val: CocoDataset, tmp_path: Path
) -> None:
    config = given_proposals("fast_rcnn")
    predictor = retrain(
        config,
        roi_op="roi_pool",
        train_config=QUICK,
        train=load_coco(folder / "train.json"),
        val=val,
        state_path=tmp_path / "run" / "state.pt",
        device=torch.device("cpu"),
    )
    searching = measure(predictor, val, roi_op="roi_pool")
    cache = ProposalCache(tmp_path / "val", config.proposals)
    with patch("service.modeling.fast_rcnn.selective_search", side_effect=AssertionError("searched in timed code")):
        measured = measure(predictor, val, roi_op="roi_pool", proposals=cache)
    assert measured.evaluation.boxes.ap50 == pytest.approx(searching.evaluation.boxes.ap50)
