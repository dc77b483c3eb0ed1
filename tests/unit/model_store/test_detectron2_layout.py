import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from service.errors import ModelStoreError
from service.model_store.importing import ImportedModel, import_checkpoint
from service.model_store.torchvision_layout import builder_config, with_backbone
from service.modeling.build import build_model
from service.modeling.config import ModelConfig

Detect = Callable[[nn.Module], dict[str, Tensor]]
Rebuild = Callable[[ImportedModel], nn.Module]

LABELS = ("a", "b", "c")
# Our names and detectron2's, part by part.
NAMES = (
    (r"backbone\.body\.conv1\.", "backbone.bottom_up.stem.conv1."),
    (r"backbone\.body\.bn1\.", "backbone.bottom_up.stem.conv1.norm."),
    (r"backbone\.body\.layer1\.", "backbone.bottom_up.res2."),
    (r"backbone\.body\.layer2\.", "backbone.bottom_up.res3."),
    (r"backbone\.body\.layer3\.", "backbone.bottom_up.res4."),
    (r"backbone\.body\.layer4\.", "backbone.bottom_up.res5."),
    (r"(res\d\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"downsample\.0\.", "shortcut."),
    (r"downsample\.1\.", "shortcut.norm."),
    (r"fpn\.inner_blocks\.0\.0", "fpn_lateral2"),
    (r"fpn\.inner_blocks\.1\.0", "fpn_lateral3"),
    (r"fpn\.inner_blocks\.2\.0", "fpn_lateral4"),
    (r"fpn\.inner_blocks\.3\.0", "fpn_lateral5"),
    (r"fpn\.layer_blocks\.0\.0", "fpn_output2"),
    (r"fpn\.layer_blocks\.1\.0", "fpn_output3"),
    (r"fpn\.layer_blocks\.2\.0", "fpn_output4"),
    (r"fpn\.layer_blocks\.3\.0", "fpn_output5"),
    (r"rpn\.head\.conv\.0\.0", "proposal_generator.rpn_head.conv"),
    (r"rpn\.head\.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
    (r"rpn\.head\.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
    (r"box_head\.fc6", "box_head.fc1"),
    (r"box_head\.fc7", "box_head.fc2"),
    (r"mask_head\.0\.0", "mask_head.mask_fcn1"),
    (r"mask_head\.1\.0", "mask_head.mask_fcn2"),
    (r"mask_head\.2\.0", "mask_head.mask_fcn3"),
    (r"mask_head\.3\.0", "mask_head.mask_fcn4"),
    (r"mask_predictor\.conv5_mask", "mask_head.deconv"),
    (r"mask_predictor\.mask_fcn_logits", "mask_head.predictor"),
)


def as_detectron2(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict as detectron2 would have saved the same network, which has learned on BGR images."""
    renamed = {}
    for key, tensor in state_dict.items():
        for ours, theirs in NAMES:
            key = re.sub(ours, theirs, key)
        renamed[key] = tensor
    stem, predictor = "backbone.bottom_up.stem.conv1.weight", "roi_heads.box_predictor"
    renamed[stem] = renamed[stem][:, [2, 1, 0]]
    for kind in ("weight", "bias"):
        background, *classes = renamed[f"{predictor}.cls_score.{kind}"]
        renamed[f"{predictor}.cls_score.{kind}"] = torch.stack([*classes, background])
        renamed[f"{predictor}.bbox_pred.{kind}"] = renamed[f"{predictor}.bbox_pred.{kind}"][4:]
        if f"roi_heads.mask_head.predictor.{kind}" in renamed:
            renamed[f"roi_heads.mask_head.predictor.{kind}"] = renamed[f"roi_heads.mask_head.predictor.{kind}"][1:]
    renamed["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    renamed["pixel_mean"] = torch.tensor([103.53, 116.28, 123.675]).reshape(3, 1, 1)
    return renamed


def zoo_config(builder: str) -> ModelConfig:
    """detectron2's `mask_rcnn_R_50_FPN` and `faster_rcnn_R_50_FPN`, said in our words."""
    config = builder_config(builder, LABELS)
    changes = {
        "backbone": {"stride_in_1x1": True},
        "transform": {"mean": (123.675 / 255, 116.28 / 255, 103.53 / 255), "std": (1 / 255, 1 / 255, 1 / 255)},
        "anchors": {"style": "detectron2"},
        "rpn": {"post_nms_top_n_train": 1000},
        "roi": {"sampling_ratio": 0, "aligned": True},
    }
    tables = {name: getattr(config, name).model_copy(update=table) for name, table in changes.items()}
    return config.model_copy(update=tables)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model_final.pkl"


@pytest.fixture
def save(path: Path) -> Callable[[dict[str, Tensor]], None]:
    """As detectron2's model zoo has it: a pickle of NumPy arrays."""

    def save(state_dict: dict[str, Tensor]) -> None:
        arrays = {key: tensor.numpy() for key, tensor in state_dict.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "test", "matching_heuristics": True}, protocol=2))

    return save


def test_a_detectron2_checkpoint_answers_as_the_same_network_in_torchvisions_layout(
    path: Path,
    save: Callable[[dict[str, Tensor]], None],
    randomise: Callable[[nn.Module], None],
    rebuild: Rebuild,
    detect: Detect,
) -> None:
    config = zoo_config("maskrcnn_resnet50_fpn")
    network = build_model(config)
    randomise(network)
    save(as_detectron2(network.state_dict()))
    imported = import_checkpoint(path, labels=LABELS)
    assert imported.config.model_copy(update={"transform": config.transform}) == config
    assert imported.config.transform.mean == pytest.approx(config.transform.mean)
    assert imported.config.transform.std == pytest.approx(config.transform.std)

    found, expected = detect(rebuild(imported)), detect(rebuild(ImportedModel(config, network.state_dict())))
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-4, rtol=0)


def test_a_faster_rcnn_with_resnet101_from_a_torch_file_is_recognised(path: Path) -> None:
    config = with_backbone(zoo_config("fasterrcnn_resnet50_fpn"), name="resnet101_fpn")
    torch.save({"model": as_detectron2(build_model(config).state_dict()), "iteration": 90_000}, path)
    imported = import_checkpoint(path, labels=LABELS).config
    assert (imported.architecture, imported.backbone) == ("faster_rcnn", config.backbone)


def test_a_name_that_is_not_of_these_networks_is_reported_as_surplus(path: Path) -> None:
    state_dict = as_detectron2(build_model(zoo_config("fasterrcnn_resnet50_fpn")).state_dict())
    torch.save({**state_dict, "roi_heads.keypoint_head.score_lowres.bias": torch.zeros(1)}, path)
    with pytest.raises(ModelStoreError, match=r"network\n  surplus: roi_heads\.keypoint_head\.score_lowres\.bias$"):
        import_checkpoint(path, labels=LABELS)


def test_what_we_cannot_build_or_need_not_be_told_is_said(path: Path) -> None:
    torch.save({"backbone.res2.0.conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelStoreError, match="a detectron2 network on C4"):
        import_checkpoint(path, labels=LABELS)
    state_dict = {"backbone.bottom_up.x": torch.zeros(1), "roi_heads.box_predictor.cls_score.bias": torch.zeros(4)}
    torch.save(state_dict, path)
    with pytest.raises(ModelStoreError, match="tells its architecture itself"):
        import_checkpoint(path, labels=LABELS, architecture="fasterrcnn_resnet50_fpn")
