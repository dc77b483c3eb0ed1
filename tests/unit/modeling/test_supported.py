"""Whatever the table "What can be combined" of docs/models.md says yes to is built; one of each kind answers and
trains; the rest is refused with what would have been right.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from service.inference.predictor import Predictor
from service.modeling.build import build_model
from service.modeling.config import Architecture, BackboneConfig, BackboneName, ModelConfig, PatchOp, RoIOp
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.structures import DetectOptions, Image, Query
from service.training.loop import evaluation_info
from tests.tiny_models import LOSSES

PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
Cell = tuple[str, str, str]
PATHS = {"a model": "timm/rexnet_100", "a classifier": "torchvision/mobilenet_v2"}
"""Rows that stand for many, and the one of each that is tried."""
LARGE = re.compile(r"resnet(101|152)|resnext101|wide_|resnet34|resnet50_c5|resnext50_32x4d_c5")
"""Trunks that differ from a smaller one of the same form in size alone, which are built and not trained."""


def table() -> dict[tuple[str, str], str]:
    """What the page says of each (backbone, operator): `yes`, `box branch` or `no`."""
    section = PAGE.split("## What can be combined\n")[1].split("\n## ")[0]
    header, _, *rows = (line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|"))
    return {
        (backbone, op): answer
        for backbones, *answers in rows
        for backbone in re.findall(r"`(\w+)`(?=,|:|$)", backbones) or [_example(backbones)]
        for ops, answer in zip(header[1:], answers, strict=True)
        for op in re.findall(r"`(\w+)`", ops)
    }


def _example(words: str) -> str:
    return next(path for start, path in PATHS.items() if words.startswith(start))


TABLE = table()
CELLS = [(architecture, *cell) for architecture in get_args(Architecture) for cell in TABLE]
"""`crop` is for `rcnn` alone, and `rcnn` for `crop` alone."""
SUPPORTED = [cell for cell in CELLS if TABLE[cell[1:]] != "no" and (cell[0] == "rcnn") is (cell[2] == "crop")]
UNSUPPORTED = [cell for cell in CELLS if cell not in SUPPORTED]
TRAINED = [cell for cell in SUPPORTED if not LARGE.match(cell[1])]


def document(architecture: str, backbone: str, op: str) -> dict[str, Any]:
    """The smallest network of a cell: two cores run these tests."""
    trunk: dict[str, Any] = {"name": backbone}
    if backbone != "vgg16":
        trunk["norm"] = "batch_norm"
    if backbone.startswith("narrow_"):
        trunk["width"] = 8
    if BackboneConfig.model_validate(trunk).has_pyramid:
        trunk["out_channels"] = 8
    tables: dict[str, dict[str, Any]] = {"roi": {"op": op, "batch_size_per_image": 4}}
    if architecture in ("faster_rcnn", "mask_rcnn"):
        tables["anchors"] = {"sizes": [[16, 32]] * (BackboneConfig.model_validate(trunk).num_levels or 5)}
        tables["rpn"] = {f"{when}_nms_top_n_{phase}": 8 for when in ("pre", "post") for phase in ("train", "test")}
    if architecture == "mask_rcnn":
        tables["roi"] |= {"mask_output_size": 4, "mask_head_channels": [8]}
        tables["roi"]["mask"] = {"op": "roi_align"} if op == "spp" else {}
    if architecture == "rcnn":
        tables["roi"] |= {"crop_size": 64, "crop_padding": 4, "crops_per_chunk": 3}
    if not backbone.endswith("_c4"):
        tables["roi"] |= {"box_output_size": 2, "box_head_channels": 8, "box_head_dropout": 0.0}
    elif architecture != "rcnn":
        tables["roi"] |= {"box_output_size": 2}
    return {
        "architecture": architecture,
        "labels": ["disc"],
        "backbone": trunk,
        "transform": {"min_size": 64, "max_size": 64},
        **tables,
    }


def disc() -> tuple[Image, dict[str, torch.Tensor]]:
    """A white disc of radius 20 on black, and where it is."""
    y, x = np.mgrid[:64, :64]
    inside = (x - 30) ** 2 + (y - 28) ** 2 < 20**2
    image = Image(np.repeat(inside[:, :, None], 3, axis=2).astype(np.uint8) * 255)
    target = {
        "boxes": torch.tensor([[10.0, 8, 50, 48]]),
        "labels": torch.tensor([1]),
        "masks": torch.from_numpy(inside[None].astype(np.uint8)),
        "proposals": torch.tensor([[12.0, 8, 48, 50], [0, 0, 20, 20], [30, 30, 64, 64]]),
    }
    return image, target


def losses_of(model: GeneralizedRCNN) -> dict[str, torch.Tensor]:
    """On two pictures, with the same proposals sampled in every call."""
    torch.manual_seed(0)
    image, target = disc()
    pixels = torch.from_numpy(image.pixels).permute(2, 0, 1) / 255
    losses: dict[str, torch.Tensor] = model.train()([pixels, pixels.flip(2)], [target, target])
    return losses


def take_step(model: GeneralizedRCNN, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """One step; returns the losses before it."""
    losses = losses_of(model)
    optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    return {name: float(loss.detach()) for name, loss in losses.items()}


@torch.no_grad()
def settle_norms(model: GeneralizedRCNN) -> None:
    """Give the norms the statistics of the pictures under the present weights.

    After two steps their usual averages still are of the start, which adds up over a hundred layers to boxes far away.
    """
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 1.0
    losses_of(model)


def test_the_page_speaks_of_every_backbone_and_operator() -> None:
    backbones = (*get_args(BackboneName), *PATHS.values())
    assert set(TABLE) == {(backbone, op) for backbone in backbones for op in get_args(RoIOp)}
    assert set(TABLE.values()) == {"yes", "box branch", "no"}


@pytest.mark.parametrize(
    ("architecture", "backbone", "op"),
    [cell for cell in SUPPORTED if cell not in TRAINED and cell[2] in ("roi_align", "crop") and cell[0] != "fast_rcnn"],
)
def test_a_supported_cell_of_a_large_trunk_is_built(architecture: str, backbone: str, op: str) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig.model_validate(document(architecture, backbone, op)))
    assert model.roi_heads.box_roi_pool.roi.op == op


@pytest.mark.parametrize(("architecture", "backbone", "op"), TRAINED)
def test_a_supported_cell_is_built_answers_and_trains(architecture: str, backbone: str, op: str) -> None:
    torch.manual_seed(0)
    if backbone.startswith("timm/"):
        pytest.importorskip("timm", reason="the extra 'timm' is not installed")
    config = ModelConfig.model_validate(document(architecture, backbone, op))
    model = build_model(config)
    assert model.roi_heads.box_roi_pool.roi.op == op

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    first, second = take_step(model, optimizer), take_step(model, optimizer)
    own = {"loss_mask": config.has_masks, "loss_objectness": config.has_rpn, "loss_rpn_box_reg": config.has_rpn}
    assert set(first) == {name for name in LOSSES if own.get(name, True)}
    assert np.isfinite([*first.values(), *second.values()]).all()
    assert all(first[name] != second[name] for name in first)  # every branch has learnt something
    # MobileNet's second map is for the RPN alone.
    has_unused_map = backbone == "mobilenet_v3_large_fpn" and not config.has_rpn
    for part in model.children():
        gradients = [one.grad for one in part.parameters()]
        assert all(one.isfinite().all() for one in gradients if one is not None)
        assert has_unused_map or all(one is not None for one in gradients)
        assert not gradients or any(one is not None and one.any() for one in gradients)

    settle_norms(model)
    predictor = Predictor(model, info=evaluation_info(config), device=torch.device("cpu"))
    proposals = None if config.has_rpn else ((10.0, 8.0, 50.0, 48.0), (0.0, 0.0, 30.0, 30.0))
    query = Query(disc()[0], DetectOptions(score_thresh=0.0, proposals=proposals))
    found = predictor.predict([query])[0].detections
    assert len(found) >= 1
    assert (found.masks is not None) is config.has_masks
    if found.masks is not None:
        side = 4 if backbone.endswith("_c4") else 8
        assert found.masks.shape == (len(found), side, side)


@pytest.mark.parametrize(("architecture", "backbone", "op"), UNSUPPORTED)
def test_an_unsupported_cell_is_refused_with_the_supported_ones(architecture: str, backbone: str, op: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(document(architecture, backbone, op))
    words = str(caught.value)
    if architecture != "rcnn":
        assert f"with {backbone}" in words
        assert {other for other in get_args(PatchOp) if other not in words} == set()
    elif op == "crop":  # on a pyramid
        named = words.replace("torchvision/<model>", PATHS["a classifier"])
        assert {
            one for (one, op), answer in TABLE.items() if op == "crop" and answer == "yes" and one not in named
        } == set()
    else:
        assert "expected roi.op = 'crop'" in words


@pytest.mark.parametrize("backbone", [backbone for (backbone, _), answer in TABLE.items() if answer == "box branch"])
def test_what_is_for_the_box_branch_alone_is_refused_to_masks_with_what_they_can_take(backbone: str) -> None:
    both = document("mask_rcnn", backbone, "spp")
    both["roi"]["mask"] = {}
    with pytest.raises(ValidationError, match=rf"roi\.mask\.op to be one of {', '.join(get_args(PatchOp))}"):
        ModelConfig.model_validate(both)
