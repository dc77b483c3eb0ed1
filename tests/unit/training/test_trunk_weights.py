"""Published weights of a trunk stand in the network where its builder would have put them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import resnet18, resnet34, resnet50, vgg
from torchvision.models.mobilenetv3 import mobilenet_v3_large

from service.errors import ModelStoreError
from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.training.trunk_weights import load_trunk_weights


def config(name: str) -> ModelConfig:
    document: dict[str, Any] = {"architecture": "faster_rcnn", "labels": ["a"], "backbone": {"name": name}}
    if name == "vgg16":
        document["roi"] = {"box_head_channels": 8}
    return ModelConfig.model_validate(document)


def loaded(name: str, path: Path) -> dict[str, torch.Tensor]:
    """The network's weights after its trunk's were loaded; all of the trunk must have been."""
    model = build_model(config(name))
    left = model.load_state_dict(load_trunk_weights(path, config(name)), strict=False)
    assert not left.unexpected_keys
    assert not [key for key in left.missing_keys if ".body." in key and "num_batches" not in key]
    return model.state_dict()


def vgg16_features() -> dict[str, torch.Tensor]:
    """Of a whole VGG-16, but without the 500 MB of its classifier."""
    return {f"features.{key}": value for key, value in vgg.make_layers(vgg.cfgs["D"]).state_dict().items()}


@pytest.mark.parametrize(
    ("name", "source", "ours", "theirs"),
    [
        (
            "resnet18_fpn",
            lambda: resnet18().state_dict(),
            "backbone.body.layer4.1.conv2.weight",
            "layer4.1.conv2.weight",
        ),
        (
            "mobilenet_v3_large_fpn",
            lambda: mobilenet_v3_large().state_dict(),
            "backbone.body.16.0.weight",
            "features.16.0.weight",
        ),
        (
            "resnet50_c4",
            lambda: resnet50().state_dict(),
            "roi_heads.box_head.layer4.2.conv3.weight",
            "layer4.2.conv3.weight",
        ),
        (
            "vgg16",
            lambda: {**vgg16_features(), "classifier.0.weight": torch.zeros(2, 2)},
            "backbone.body.28.weight",
            "features.28.weight",
        ),
    ],
)
def test_weights_of_torchvisions_classifiers_fit(
    tmp_path: Path, name: str, source: Any, ours: str, theirs: str
) -> None:
    weights = source()
    torch.save(weights, tmp_path / "trunk.pth")
    torch.testing.assert_close(loaded(name, tmp_path / "trunk.pth")[ours], weights[theirs])


@pytest.mark.parametrize("model", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_weights_of_timms_classifiers_fit(tmp_path: Path, model: str) -> None:
    timm = pytest.importorskip("timm")
    source = timm.create_model(model, pretrained=False).state_dict()
    torch.save(source, tmp_path / "trunk.pth")
    network = config(f"timm/{model}")
    weights = load_trunk_weights(tmp_path / "trunk.pth", network)
    body = {key for key in build_model(network).state_dict() if key.startswith("backbone.body.")}
    assert {key for key in body if "num_batches" not in key} <= weights.keys()
    for key, value in weights.items():
        assert any(value.shape == other.shape and torch.equal(value, other) for other in source.values()), key


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (lambda: resnet34().state_dict(), "of parts that the trunk does not have: layer1.2.conv1.weight"),
        (vgg16_features, "missing: bn1.bias"),
    ],
)
def test_weights_of_another_trunk_are_refused_by_name(tmp_path: Path, source: Any, words: str) -> None:
    torch.save(source(), tmp_path / "other.pth")
    with pytest.raises(ModelStoreError) as caught:
        load_trunk_weights(tmp_path / "other.pth", config("resnet18_fpn"))
    assert "expected the weights of the trunk of resnet18_fpn" in str(caught.value)
    assert words in str(caught.value)


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    source = resnet18().state_dict()
    source["conv1.weight"] = source["conv1.weight"][:, :1]
    torch.save(source, tmp_path / "grey.pth")
    with pytest.raises(ModelStoreError, match=r"conv1.weight \(expected \(64, 3, 7, 7\), got \(64, 1, 7, 7\)"):
        load_trunk_weights(tmp_path / "grey.pth", config("resnet18_fpn"))
