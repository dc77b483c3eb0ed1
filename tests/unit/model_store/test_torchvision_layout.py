from typing import get_args

import pytest
import torch

from service.errors import ModelStoreError
from service.model_store.torchvision_layout import inferred, num_labels, with_class_specific_outputs, with_current_names
from service.modeling.build import build_model
from service.modeling.config import BackboneName, ModelConfig


def network(name: str, /, **tables: object) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """A small network of that backbone and the shapes of its weights, without any memory."""
    width = {"width": 16} if name.startswith("narrow_") else {}
    document = {"architecture": "mask_rcnn", "labels": ["a", "b"], "backbone": {"name": name, **width}, **tables}
    config = ModelConfig.model_validate(document)
    with torch.device("meta"):
        return config, build_model(config).state_dict()


RESNETS = [name for name in get_args(BackboneName) if "resne" in name]


@pytest.mark.parametrize("backbone", RESNETS)
def test_every_resnet_is_known_by_its_shapes(backbone: str) -> None:
    config, weights = network(backbone)
    found = inferred(weights)
    assert found.get("backbone.name") == backbone
    assert found.get("backbone.norm") == "frozen_batch_norm"
    assert not found.doubts
    # The rest of the papers' and torchvision's numbers follow from the name.
    given = {"labels": ["a", "b"]}
    assert found.answered(given) == config


@pytest.mark.parametrize("model", ["efficientnet_b0", "densenet121", "convnext_tiny", "mobilenet_v3_large"])
def test_the_features_of_torchvisions_classifiers_are_known_by_their_shapes(model: str) -> None:
    _, weights = network(f"torchvision/{model}")
    assert inferred(weights).get("backbone.name") == f"torchvision/{model}"


def test_what_a_trunk_leaves_open_is_asked_for() -> None:
    """A pooling has no weights: whether it is there decides the stride."""
    _, weights = network("torchvision/vgg16")
    with pytest.raises(ModelStoreError, match=r"whether it is kept .* = 31\) or left out, .* \(features_stop = 30\)"):
        inferred(weights).answered({"labels": ["a", "b"]})
    config = inferred(weights).answered({"labels": ["a", "b"], "backbone": {"features_stop": 30}})
    assert config.backbone.features_stop == 30


@pytest.mark.parametrize(
    ("tables", "asked"),
    [
        ({"anchors": {"aspect_ratios": [1, 2, 3, 4]}}, "anchors of 4 a place on 5 map"),
        (
            {"backbone": {"name": "resnet18_fpn", "returned_layers": [2, 3, 4]}, "anchors": {"sizes": [[8]] * 4}},
            "anchors of 3 a place on 4 map",
        ),
        ({"transform": {"channels": "grey", "mean": [0.5], "std": [0.5]}}, "reads 1 channel.*give transform.mean"),
        (
            {"transform": {"channels": "rgba", "mean": [0.5] * 4, "std": [0.5] * 4}},
            "reads 4 channel.*give transform.mean",
        ),
    ],
)
def test_what_cannot_be_assumed_is_asked_for(tables: dict[str, object], asked: str) -> None:
    config, weights = network("resnet18_fpn", **tables)
    with pytest.raises(ModelStoreError, match=asked):
        inferred(weights).answered({"labels": ["a", "b"]})
    answer = {"labels": ["a", "b"], "anchors": config.anchors.model_dump(), "transform": config.transform.model_dump()}
    assert inferred(weights).answered(answer) == config


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("roi_heads.keypoint_head.0.weight", "Keypoint R-CNN"),
        ("roi_heads.box_predictor.0.cls_score.weight", "Cascade R-CNN"),
        ("head.classification_head.conv.0.0.weight", "one-stage detector"),
        ("fc.weight", "a classifier"),
    ],
)
def test_networks_that_are_not_served_are_called_what_they_are(name: str, words: str) -> None:
    with pytest.raises(ModelStoreError, match=words):
        num_labels({name: torch.zeros(1)})


def test_one_box_for_all_classes_becomes_the_same_box_for_each() -> None:
    weights = {
        "roi_heads.box_predictor.cls_score.bias": torch.zeros(3),
        "roi_heads.box_predictor.bbox_pred.weight": torch.arange(8.0).reshape(4, 2),
        "roi_heads.box_predictor.bbox_pred.bias": torch.arange(4.0),
    }
    repeated, notes = with_class_specific_outputs(weights)
    assert repeated["roi_heads.box_predictor.bbox_pred.bias"].tolist() == [0, 1, 2, 3] * 3
    assert repeated["roi_heads.box_predictor.bbox_pred.weight"].shape == (12, 2)
    assert "class-agnostic" in notes[0]


def test_names_from_before_0_13_become_the_current_ones_and_others_stay() -> None:
    renamed = {
        "backbone.fpn.inner_blocks.0.weight": "backbone.fpn.inner_blocks.0.0.weight",
        "backbone.fpn.layer_blocks.3.bias": "backbone.fpn.layer_blocks.3.0.bias",
        "rpn.head.conv.weight": "rpn.head.conv.0.0.weight",
        "roi_heads.mask_head.mask_fcn1.weight": "roi_heads.mask_head.0.0.weight",
        "roi_heads.mask_head.mask_fcn4.bias": "roi_heads.mask_head.3.0.bias",
        "backbone.fpn.inner_blocks.0.1.weight": "backbone.fpn.inner_blocks.0.1.weight",
        "rpn.head.conv.1.0.weight": "rpn.head.conv.1.0.weight",
    }
    old = {name: torch.tensor(number) for number, name in enumerate(renamed)}
    assert with_current_names(old) == {renamed[name]: tensor for name, tensor in old.items()}
