import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import detection

from service.errors import ModelStoreError
from service.model_store.importing import ImportedModel, import_checkpoint
from service.model_store.labels import read_labels
from service.model_store.published import published_weights
from service.model_store.torchvision_layout import BUILDERS, builder_config
from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from tests.random_detectors import with_backbone

Builder = Callable[..., nn.Module]
Detect = Callable[[nn.Module], dict[str, Tensor]]
Randomise = Callable[[nn.Module], None]
Rebuild = Callable[[ImportedModel], nn.Module]

LABELS = ("a", "b", "c")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pth"


@pytest.fixture
def small_checkpoint(build: Builder, path: Path) -> dict[str, Tensor]:
    """A MobileNet detector's state dict for LABELS, saved at `path`."""
    state_dict = build("fasterrcnn_mobilenet_v3_large_320_fpn", num_classes=4).state_dict()
    torch.save(state_dict, path)
    return state_dict


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize("builder", BUILDERS)
def test_each_builders_network_is_ours_weight_by_weight_and_answer_by_answer(
    builder: str, path: Path, build: Builder, randomise: Randomise, rebuild: Rebuild, detect: Detect
) -> None:
    theirs = build(builder, num_classes=4)
    randomise(theirs)
    torch.save(theirs.state_dict(), path)
    imported = import_checkpoint(path, labels=LABELS, architecture=builder)
    assert imported.state_dict.keys() == theirs.state_dict().keys()
    assert all(tensor.equal(imported.state_dict[key]) for key, tensor in theirs.state_dict().items())
    assert_same(detect(rebuild(imported)), detect(theirs))


def test_published_weights_answer_as_torchvision_lets_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Builder,
    randomise: Randomise,
    rebuild: Rebuild,
    detect: Detect,
) -> None:
    """torchvision takes the norms' epsilon away from the published `fasterrcnn_resnet50_fpn`, whose file has the names
    of an older release. A file of that name, with weights at random, stands in torchvision's download folder here.
    """
    published = published_weights("fasterrcnn_resnet50_fpn")
    random = build("fasterrcnn_resnet50_fpn", num_classes=91)
    randomise(random)
    random.backbone.body.bn1.running_var.uniform_(1e-5, 1e-4)  # type: ignore[operator,union-attr]  # where epsilon counts
    path = tmp_path / "hub" / "checkpoints" / published.file_name
    path.parent.mkdir(parents=True)
    torch.save(with_old_names(random.state_dict()), path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    expected = detect(build("fasterrcnn_resnet50_fpn", weights="COCO_V1"))

    imported = import_checkpoint(path, labels=published.labels, norm_eps=published.norm_eps)
    assert_same(detect(rebuild(imported)), expected)
    with pytest.raises(AssertionError):
        assert_same(detect(rebuild(import_checkpoint(path, labels=published.labels, norm_eps=1e-5))), expected)


def with_old_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchvision named a Faster R-CNN's weights before 0.13, when batch norms were frozen and counted nothing."""
    old = {key.replace("rpn.head.conv.0.0.", "rpn.head.conv."): tensor for key, tensor in state_dict.items()}
    old = {re.sub(r"(fpn\..*_blocks\.\d)\.0\.", r"\1.", key): tensor for key, tensor in old.items()}
    for layer in range(4):
        old = {key.replace(f"mask_head.{layer}.0.", f"mask_head.mask_fcn{layer + 1}."): old[key] for key in old}
    return {key: tensor for key, tensor in old.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("builder", ["maskrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"])
def test_architecture_and_norm_are_inferred_from_the_weights(builder: str, path: Path, build: Builder) -> None:
    safetensors.torch.save_file(build(builder, num_classes=4).state_dict(), path)
    config = import_checkpoint(path, labels=LABELS).config
    expected = with_backbone(builder_config(builder, LABELS), norm="batch_norm")
    assert config == expected


def test_another_resnet_in_torchvisions_layout_is_inferred(path: Path) -> None:
    config = with_backbone(builder_config("fasterrcnn_resnet50_fpn", LABELS), name="resnet18_fpn")
    torch.save(build_model(config).state_dict(), path)
    assert import_checkpoint(path, labels=LABELS).config == config


def test_a_network_on_c4_is_inferred(path: Path) -> None:
    """It has no builder; what is inferred is what docs/models.md says of the papers' network."""
    document = {"architecture": "mask_rcnn", "labels": LABELS, "backbone": {"name": "resnet50_c4"}}
    tables = {
        "anchors": {"sizes": [[32, 64, 128, 256, 512]]},
        "rpn": {"pre_nms_top_n_train": 12000, "pre_nms_top_n_test": 6000, "post_nms_top_n_test": 300},
        "roi": {"box_output_size": 14, "mask_head_channels": [256], "batch_size_per_image": 64},
    }
    config = ModelConfig.model_validate(document | tables)
    torch.save(build_model(config).state_dict(), path)
    assert import_checkpoint(path, labels=LABELS).config == config


@pytest.mark.usefixtures("small_checkpoint")
def test_an_architecture_that_the_weights_do_not_tell_is_asked_for(path: Path) -> None:
    with pytest.raises(ModelStoreError, match=r"fit fasterrcnn_mobilenet_v3_large_fpn and .*: say which with"):
        import_checkpoint(path, labels=LABELS)


@pytest.mark.usefixtures("small_checkpoint")
def test_missing_labels_are_asked_for_with_their_number(path: Path) -> None:
    with pytest.raises(ModelStoreError, match=r"checkpoint\.pth: the weights know 3 classes: name them with --labels"):
        import_checkpoint(path, labels=None)


@pytest.mark.usefixtures("small_checkpoint")
@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (("a", "b"), "wrong class count: the weights know 3 classes, got 2 labels$"),
        (("all others", "a", "b", "c"), "know 3 classes, got 4 labels; leave the background out"),
        (("a", "b", "b"), "labels: expected every label once, got twice: b"),
    ],
)
def test_labels_that_do_not_fit_are_refused(path: Path, labels: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ModelStoreError, match=problem):
        import_checkpoint(path, labels=labels, architecture="fasterrcnn_mobilenet_v3_large_320_fpn")


def test_missing_and_surplus_weights_are_named(path: Path, small_checkpoint: dict[str, Tensor]) -> None:
    small_checkpoint["rpn.head.extra.weight"] = small_checkpoint.pop("rpn.head.cls_logits.weight")
    torch.save(small_checkpoint, path)
    with pytest.raises(ModelStoreError) as caught:
        import_checkpoint(path, labels=LABELS, architecture="fasterrcnn_mobilenet_v3_large_320_fpn")
    assert str(caught.value).splitlines() == [
        f"{path}: the weights do not fit the network",
        "  missing: rpn.head.cls_logits.weight",
        "  surplus: rpn.head.extra.weight",
    ]


def test_a_weight_of_another_shape_is_named_with_both_shapes(path: Path, small_checkpoint: dict[str, Tensor]) -> None:
    small_checkpoint["rpn.head.cls_logits.bias"] = torch.zeros(3)
    torch.save(small_checkpoint, path)
    with pytest.raises(ModelStoreError, match=r"shape: rpn\.head\.cls_logits\.bias \(expected \(15,\), got \(3,\)\)$"):
        import_checkpoint(path, labels=LABELS, architecture="fasterrcnn_mobilenet_v3_large_320_fpn")


@pytest.mark.usefixtures("small_checkpoint")
def test_an_unknown_architecture_is_answered_with_the_known_ones(path: Path) -> None:
    with pytest.raises(ModelStoreError, match="no architecture 'yolo'; known: fasterrcnn_resnet50_fpn, "):
        import_checkpoint(path, labels=LABELS, architecture="yolo")


def test_weights_of_something_else_are_said_to_be_none_of_a_detector(path: Path) -> None:
    torch.save(nn.Linear(1, 1).state_dict(), path)
    with pytest.raises(ModelStoreError, match="detectron2's or mmdetection's layout, got weights named weight, bias"):
        import_checkpoint(path, labels=LABELS)


@pytest.mark.usefixtures("small_checkpoint")
def test_a_given_configuration_is_taken_as_it_is(path: Path) -> None:
    config = builder_config("fasterrcnn_mobilenet_v3_large_fpn", LABELS, norm_eps=1e-3)
    assert import_checkpoint(path, given=config.model_dump()).config == config
    with pytest.raises(ModelStoreError, match="wrong class count: expected weights for 2 labels"):
        import_checkpoint(path, given=builder_config("fasterrcnn_mobilenet_v3_large_fpn", ("a", "b")).model_dump())


def test_labels_are_read_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("\N{BYTE ORDER MARK}red cell\r\n platelet \n\n".encode())
    assert read_labels(path).fitted(2) == ("red cell", "platelet")


def test_torchvisions_own_list_of_categories_is_read_as_its_published_models_have_it(tmp_path: Path) -> None:
    """91 lines: the background first, and `N/A` for each of the ten ids that COCO does not use."""
    categories = detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert len(categories) == 91
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(categories))
    assert read_labels(path).fitted(90) == published_weights("maskrcnn_resnet50_fpn").labels


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"a\n\nb\n", "a label on each line, got none on line 2"), (b"\xff", "UTF-8 text, got the byte 0xff")],
)
def test_a_labels_file_that_is_none_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(ModelStoreError, match=rf"labels\.txt: expected .*{problem}"):
        read_labels(path)
