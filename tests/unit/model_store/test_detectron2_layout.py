import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from service.errors import ModelStoreError
from service.model_store.importing import ImportedModel, import_checkpoint
from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.roi_heads import Selection
from tests.random_detectors import blobs, enliven
from tests.unit.model_store.detectron2_reference import detectron2_answer

LABELS = ("a", "b", "c")
# Our names and detectron2's, part by part.
NAMES = (
    (r"backbone\.body\.conv1\.", "backbone.bottom_up.stem.conv1."),
    (r"backbone\.body\.bn1\.", "backbone.bottom_up.stem.conv1.norm."),
    (r"backbone\.body\.layer1\.", "backbone.bottom_up.res2."),
    (r"backbone\.body\.layer2\.", "backbone.bottom_up.res3."),
    (r"backbone\.body\.layer3\.", "backbone.bottom_up.res4."),
    (r"backbone\.body\.layer4\.", "backbone.bottom_up.res5."),
    (r"box_head\.layer4\.", "res5."),
    (r"(res\d\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"downsample\.0\.", "shortcut."),
    (r"downsample\.1\.", "shortcut.norm."),
    (r"(fpn\.\w+_blocks\.\d)\.0\.", r"\1."),
    (r"(fpn\.\w+_blocks\.\d)\.1\.", r"\1.norm."),
    (r"fpn\.inner_blocks\.0", "fpn_lateral2"),
    (r"fpn\.inner_blocks\.1", "fpn_lateral3"),
    (r"fpn\.inner_blocks\.2", "fpn_lateral4"),
    (r"fpn\.inner_blocks\.3", "fpn_lateral5"),
    (r"fpn\.layer_blocks\.0", "fpn_output2"),
    (r"fpn\.layer_blocks\.1", "fpn_output3"),
    (r"fpn\.layer_blocks\.2", "fpn_output4"),
    (r"fpn\.layer_blocks\.3", "fpn_output5"),
    (r"rpn\.head\.conv\.0\.0", "proposal_generator.rpn_head.conv"),
    (r"rpn\.head\.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
    (r"rpn\.head\.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
    (r"box_head\.fc6", "box_head.fc1"),
    (r"box_head\.fc7", "box_head.fc2"),
    (r"((?:box|mask)_head\.\d)\.0\.", r"\1."),
    (r"((?:box|mask)_head\.\d)\.1\.", r"\1.norm."),
    (r"mask_head\.0", "mask_head.mask_fcn1"),
    (r"mask_head\.1", "mask_head.mask_fcn2"),
    (r"mask_head\.2", "mask_head.mask_fcn3"),
    (r"mask_head\.3", "mask_head.mask_fcn4"),
    (r"box_head\.3\.(weight|bias)", r"box_head.fc1.\1"),  # behind two convolutions and a flattening
    (r"box_head\.0", "box_head.conv1"),
    (r"box_head\.1", "box_head.conv2"),
    (r"mask_predictor\.conv5_mask", "mask_head.deconv"),
    (r"mask_predictor\.mask_fcn_logits", "mask_head.predictor"),
)


def as_detectron2(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict as detectron2 would have saved the same network, which has learned on BGR images."""
    renamed = {}
    is_c4 = not any(key.startswith("backbone.fpn") for key in state_dict)
    for key, tensor in state_dict.items():
        for ours, theirs in NAMES:
            key = re.sub(ours, theirs, key)
        renamed[key.replace("backbone.bottom_up.", "backbone.") if is_c4 else key] = tensor
    stem = "backbone.stem.conv1.weight" if is_c4 else "backbone.bottom_up.stem.conv1.weight"
    predictor = "roi_heads.box_predictor"
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


def zoo_config(name: str) -> ModelConfig:
    """detectron2's `mask_rcnn_R_50_FPN` and its like, said in our words."""
    architecture, on = re.fullmatch(r"(\w+_rcnn)_R_(.*)", name).groups()  # type: ignore[union-attr]  # they all match
    pyramid: dict[str, Any] = {"rpn": {"post_nms_top_n_train": 1000}}
    c4: dict[str, Any] = {
        "anchors": {"sizes": [[32, 64, 128, 256, 512]]},
        "rpn": {
            "pre_nms_top_n_train": 12000,
            "post_nms_top_n_train": 2000,
            "pre_nms_top_n_test": 6000,
            "post_nms_top_n_test": 1000,
        },
        "roi": {"box_output_size": 14, "mask_output_size": 14, "mask_head_channels": [256]},
    }
    is_c4 = on.endswith("C4")
    tables: dict[str, dict[str, Any]] = {"anchors": {}, "roi": {}} | (c4 if is_c4 else pyramid)
    tables["anchors"] |= {"style": "detectron2"}
    tables["roi"] |= {"sampling_ratio": 0, "aligned": True, "batch_size_per_image": 512}
    return ModelConfig.model_validate(
        {
            "architecture": architecture,
            "labels": LABELS,
            "backbone": {"name": f"resnet{on.lower()}", "stride_in_1x1": True},
            "transform": {
                "style": "detectron2",
                "size_divisible": 1 if is_c4 else 32,
                "mean": (123.675 / 255, 116.28 / 255, 103.53 / 255),
                "std": (1 / 255, 1 / 255, 1 / 255),
            },
            **({"masks": {"style": "detectron2"}} if architecture == "mask_rcnn" else {}),
            **tables,
        }
    )


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


def network_of(imported: ImportedModel, image: Tensor) -> GeneralizedRCNN:
    """Our network of an import, which leaves the (H, W, 3) picture as large as it is."""
    height, width, _ = image.shape
    small = imported.config.transform.model_copy(update={"min_size": height, "max_size": width})
    network = build_model(imported.config.model_copy(update={"transform": small})).eval()
    network.load_state_dict(imported.state_dict)
    return network


def answer(network: GeneralizedRCNN, image: Tensor) -> dict[str, Tensor]:
    """What the server's own path finds in the picture."""
    selection = Selection(score_thresh=0.05, detections_per_img=100)
    [found] = network.detect([image], [selection], with_masks=[True], proposals=[None])
    masks = {} if found.masks is None else {"masks": found.masks}
    return {"boxes": found.boxes, "scores": found.scores, "labels": found.labels, **masks}


def assert_agree(found: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """But for the few whose order or neighbour rounding decides, each of the reference's detections is among ours."""
    apart = (found["boxes"][:, None] - reference["boxes"]).abs().amax(dim=2)
    apart[found["labels"][:, None] != reference["labels"] + 1] = math.inf
    distance, ours = apart.min(dim=0)
    near = distance < 0.02
    assert near.float().mean() > 0.95
    for key, atol in {"scores": 2e-3, "masks": 2e-2}.items():
        if key in reference:
            torch.testing.assert_close(found[key][ours[near]], reference[key][near], atol=atol, rtol=0)


@pytest.mark.parametrize(
    "name", ["faster_rcnn_R_50_FPN", "mask_rcnn_R_50_FPN", "faster_rcnn_R_50_C4", "mask_rcnn_R_50_C4"]
)
def test_a_detectron2_checkpoint_answers_as_detectron2_and_as_the_same_network_in_torchvisions_layout(
    name: str, path: Path, save: Callable[[dict[str, Tensor]], None]
) -> None:
    torch.manual_seed(0)
    config = zoo_config(name)
    # C4's head is heavy, a pyramid needs more to look at. detectron2 pads for a pyramid and not for C4.
    image = torch.from_numpy(blobs(36, 68) if name.endswith("C4") else blobs(60, 88))
    network = network_of(ImportedModel(config, build_model(config).state_dict()), image)
    enliven(network, lambda: answer(network, image))
    detectron2 = as_detectron2(network.state_dict())
    save(detectron2)
    imported = import_checkpoint(path, labels=LABELS)
    assert imported.config.model_copy(update={"transform": config.transform}) == config
    assert imported.config.transform.style == "detectron2"
    assert imported.config.transform.size_divisible == config.transform.size_divisible
    assert imported.config.transform.mean == pytest.approx(config.transform.mean)
    assert imported.config.transform.std == pytest.approx(config.transform.std)

    found, same = answer(network_of(imported, image), image), answer(network, image)
    assert ("masks" in found) == name.startswith("mask")
    assert set(found["labels"].tolist()) == {1, 2, 3}
    # The mean goes through detectron2's 0 to 255 and back: at this standard deviation its last bit shows in the boxes.
    for key, tensor in same.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-4 if key == "scores" else 1e-3, rtol=0)
    with torch.no_grad():
        assert_agree(found, detectron2_answer(detectron2, image.flip(2).permute(2, 0, 1).float()))


def resnext(name: str = "resnext50_32x4d_fpn") -> dict[str, Any]:
    """As X-101-32x8d is configured, which is too large for a test that computes something."""
    return {
        "backbone": {"name": name},
        "transform": {"mean": MEAN, "std": tuple(one / 255 for one in (58.395, 57.12, 57.375))},
    }


MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
GROUP_NORM = {"norm": "group_norm", "fpn_norm": "group_norm"}
VARIANTS: dict[str, dict[str, Any]] = {
    "resnext": resnext(),
    "group norm": {
        "backbone": {"name": "resnet50_fpn", **GROUP_NORM},
        "transform": {"mean": MEAN, "std": (1 / 255, 1 / 255, 1 / 255)},
        "roi": {"box_head_convs": [256, 256], "head_norm": "group_norm", "mask_head_channels": [256]},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_trunks_and_norms_answer_as_detectron2(
    variant: str, path: Path, save: Callable[[dict[str, Tensor]], None]
) -> None:
    """Neither of them strides in 1 x 1, which no weight tells; only the resnext's deviation is not 1."""
    torch.manual_seed(0)
    tables = VARIANTS[variant]
    base = zoo_config("mask_rcnn_R_50_FPN").model_dump()
    document = {table: {**base[table], **tables.get(table, {})} for table in ("transform", "anchors", "rpn", "roi")}
    config = ModelConfig.model_validate({**base, **document, "backbone": tables["backbone"]})
    image = torch.from_numpy(blobs(64, 96))
    network = network_of(ImportedModel(config, build_model(config).state_dict()), image)
    enliven(network, lambda: answer(network, image))
    detectron2 = as_detectron2(network.state_dict())
    save(detectron2)
    imported = import_checkpoint(path, labels=LABELS)
    assert imported.config.transform.std == pytest.approx(config.transform.std)
    assert imported.config.backbone == config.backbone
    assert imported.config.roi == config.roi
    std = [255 * one for one in config.transform.std][::-1]
    bgr = image.flip(2).permute(2, 0, 1).float()
    with torch.no_grad():
        assert_agree(
            answer(network_of(imported, image), image), detectron2_answer(detectron2, bgr, std=std, stride_in_1x1=False)
        )


def test_the_zoos_strongest_is_recognised(path: Path) -> None:
    base = zoo_config("mask_rcnn_R_50_FPN").model_dump()
    config = ModelConfig.model_validate({**base, **resnext("resnext101_32x8d_fpn")})
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in build_model(config).state_dict().items()}
    state_dict = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    torch.save({"model": as_detectron2(state_dict)}, path)
    imported = import_checkpoint(path, labels=LABELS).config
    assert imported.backbone.name == "resnext101_32x8d_fpn"
    assert not imported.backbone.stride_in_1x1
    assert imported.transform.std == pytest.approx(config.transform.std)


def test_one_box_for_all_classes_answers_as_detectron2(path: Path, save: Callable[[dict[str, Tensor]], None]) -> None:
    torch.manual_seed(0)
    config = zoo_config("faster_rcnn_R_50_FPN")
    image = torch.from_numpy(blobs(64, 96))
    network = network_of(ImportedModel(config, build_model(config).state_dict()), image)
    enliven(network, lambda: answer(network, image))
    detectron2 = as_detectron2(network.state_dict())
    for kind in ("weight", "bias"):
        key = f"roi_heads.box_predictor.bbox_pred.{kind}"
        detectron2[key] = detectron2[key][:4]
    save(detectron2)
    imported = import_checkpoint(path, labels=LABELS)
    assert any("class-agnostic" in note for note in imported.notes)
    with torch.no_grad():
        reference = detectron2_answer(detectron2, image.flip(2).permute(2, 0, 1).float())
    assert_agree(answer(network_of(imported, image), image), reference)


def detectron2_files(**buffers: Tensor) -> dict[str, Tensor]:
    """The shapes of a network, and buffers that older releases have stored beside it."""
    with torch.device("meta"):
        shapes = {key: one.shape for key, one in build_model(zoo_config("faster_rcnn_R_50_FPN")).state_dict().items()}
    state_dict = as_detectron2({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()})
    return {**state_dict, **buffers}


def test_what_a_file_says_of_its_pixels_and_anchors_is_taken(path: Path) -> None:
    """A network that was trained on RGB from torchvision's weights, with anchors of its own."""
    cells = {}
    for level, size in enumerate((8.0, 16.0, 24.0, 48.0, 96.0)):
        corners = []
        for ratio in (0.25, 1.0, 3.0):
            width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
            corners.append([-width / 2, -height / 2, width / 2, height / 2])
        cells[f"proposal_generator.anchor_generator.cell_anchors.{level}"] = torch.tensor(corners)
    pixels = {"pixel_mean": (123.675, 116.28, 103.53), "pixel_std": (58.395, 57.12, 57.375)}
    buffers = {key: torch.tensor(value).reshape(3, 1, 1) for key, value in pixels.items()}
    torch.save({"model": detectron2_files(**buffers, **cells)}, path)
    imported = import_checkpoint(path, labels=LABELS)
    config = imported.config
    assert config.transform.mean == pytest.approx((0.485, 0.456, 0.406))
    assert config.transform.std == pytest.approx((0.229, 0.224, 0.225))
    assert not config.backbone.stride_in_1x1
    assert [list(level) for level in config.anchors.sizes] == [[8], [16], [24], [48], [96]]
    assert list(config.anchors.aspect_ratios) == [0.25, 1.0, 3.0]
    told = {key: source for key, _, source in imported.rows}
    assert told["anchors.sizes"] == "the file: cell_anchors"
    assert told["transform.mean"] == "the file: pixel_mean"
    assert told["roi.aligned"] == "assumed: detectron2's model zoo"


@pytest.mark.parametrize("on", ["R_101_FPN", "R_101_C4"])
@pytest.mark.parametrize("architecture", ["faster_rcnn", "mask_rcnn"])
def test_a_resnet101_from_a_torch_file_is_recognised(architecture: str, on: str, path: Path) -> None:
    config = zoo_config(f"{architecture}_{on}")
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in build_model(config).state_dict().items()}
    # Zeros that take no room in the file.
    state_dict = as_detectron2({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()})
    torch.save({"model": state_dict, "iteration": 90_000}, path)
    imported = import_checkpoint(path, labels=LABELS).config
    assert imported.transform.mean == pytest.approx(config.transform.mean)
    assert imported.transform.std == pytest.approx(config.transform.std)
    assert imported.model_copy(update={"transform": config.transform}) == config


def test_keypoints_are_called_by_their_name(path: Path) -> None:
    state_dict = as_detectron2(build_model(zoo_config("faster_rcnn_R_50_FPN")).state_dict())
    torch.save({**state_dict, "roi_heads.keypoint_head.score_lowres.bias": torch.zeros(1)}, path)
    with pytest.raises(ModelStoreError, match=r"got a Keypoint R-CNN: keypoints are not served$"):
        import_checkpoint(path, labels=LABELS)


def test_an_architecture_that_need_not_be_told_is_refused(path: Path) -> None:
    state_dict = {
        "backbone.bottom_up.x": torch.zeros(1),
        "roi_heads.box_predictor.cls_score.bias": torch.zeros(4),
    }
    torch.save(state_dict, path)
    with pytest.raises(ModelStoreError, match="tells its architecture itself"):
        import_checkpoint(path, labels=LABELS, architecture="fasterrcnn_resnet50_fpn")
