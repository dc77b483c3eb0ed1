"""What the product is sold by: a state dict of torchvision's goes through `roiserve models import`, a picture through
`roiserve detect`, and out come torchvision's own detections.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models import detection
from typer.testing import CliRunner

from service.cli import app
from service.model_store.torchvision_layout import BUILDERS
from tests.random_detectors import blobs, enliven

NUM_LABELS = 5
SCORE_THRESH = 0.1
PICTURE = blobs(48, 400)
"""So long that all builders' own sizes make little of it: 1333 x 160 pixels, or 640 x 76."""


def roiserve(*arguments: str) -> str:
    """What the command prints; run in this process, for torch takes long to import."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def theirs(builder: str) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": NUM_LABELS + 1}
    model: nn.Module = getattr(detection, builder)(**options, box_score_thresh=SCORE_THRESH).eval()
    enliven(model, lambda: answer(model, PICTURE))
    return model


def answer(model: nn.Module, pixels: NDArray[np.uint8]) -> dict[str, Tensor]:
    with torch.inference_mode():
        found: dict[str, Tensor] = model([torch.from_numpy(pixels).permute(2, 0, 1) / 255])[0]
    return found


@pytest.mark.parametrize("builder", BUILDERS)
def test_imported_state_dicts_answer_as_torchvisions_own(builder: str, tmp_path: Path) -> None:
    model = theirs(builder)
    torch.save(model.state_dict(), tmp_path / "checkpoint.pth")
    (tmp_path / "labels.txt").write_text("".join(f"label {id_}\n" for id_ in range(1, NUM_LABELS + 1)))
    PIL.Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    store = ("--store", str(tmp_path / "store"))
    told = ("--architecture", builder, "--labels", str(tmp_path / "labels.txt"))
    roiserve("models", "import", str(tmp_path / "checkpoint.pth"), "--name", "mine", *told, *store)
    os.remove(tmp_path / "checkpoint.pth")
    printed = roiserve(
        "detect",
        str(tmp_path / "picture.png"),
        "--json",
        "--score-thresh",
        str(SCORE_THRESH),
        "--device",
        "cpu",
        *store,
    )
    ours, expected = json.loads(printed)["detections"], answer(model, PICTURE)
    assert len(ours) == len(expected["boxes"]) >= 20
    assert len({one["label_id"] for one in ours}) >= 3
    same = [among(ours, {key: values[index].numpy() for key, values in expected.items()}) for index in range(len(ours))]
    if "masks" in expected:
        ious = [mask_iou(one["mask"], mask.numpy()) for one, (mask,) in zip(same, expected["masks"], strict=True)]
        assert np.mean(np.array(ious) >= 0.999) > 0.95


def among(ours: list[dict[str, Any]], expected: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """The one of ours that is this detection; two whose scores differ by rounding alone may come in either order."""
    apart = [np.abs(np.array(one["box"]) - expected["boxes"]).max() for one in ours]
    same = [
        one
        for one, distance in zip(ours, apart, strict=True)
        if distance <= 1e-3 and one["label_id"] == expected["labels"] and abs(one["score"] - expected["scores"]) <= 1e-4
    ]
    assert same, f"nothing within 1e-3 px of {expected['boxes']}; nearest {min(apart)}"
    assert same[0]["label"] == f"label {expected['labels']}"
    return same[0]


def mask_iou(ours: dict[str, Any], probability: NDArray[np.float32]) -> float:
    """0.999 or more, unless a single pixel on the threshold is more than a thousandth of the mask: such a one falls to
    either side by the last digit of a float.
    """
    theirs = probability >= 0.5
    iou: float = coco_mask.iou([ours], [coco_mask.encode(np.asfortranarray(theirs))], [0])[0, 0]
    differing = probability[(coco_mask.decode(ours) > 0) != theirs]
    assert iou >= 0.999 or (len(differing) == 1 and abs(differing[0] - 0.5) < 1e-3), (iou, differing)
    return iou
