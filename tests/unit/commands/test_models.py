import json
from pathlib import Path

import PIL.Image
import pytest
import torch
from torchvision import models
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from typer.testing import CliRunner, Result

from service.commands.models import models_app
from service.errors import ModelStoreError
from service.model_store.model_toml import ProvenanceTable
from service.model_store.store import ModelStore
from service.model_store.torchvision_layout import builder_config
from service.modeling.build import build_model
from service.modeling.config import BackboneConfig, ModelConfig
from tests.random_detectors import blobs, enliven


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with the models cells@1, and cells@2 that has no files."""
    ModelStore(tmp_path).write_model(
        "cells",
        1,
        config=ModelConfig(architecture="faster_rcnn", labels=("a", "b"), backbone=BackboneConfig(name="resnet18_fpn")),
        state_dict={"weight": torch.zeros(500_000)},
        provenance=ProvenanceTable(licence="CC0-1.0"),
        readme="# cells\n",
    )
    (tmp_path / "cells" / "2").mkdir()
    return tmp_path


def run(store: Path, *arguments: str) -> Result:
    return CliRunner().invoke(models_app, [*arguments, "--store", str(store)])


def test_list_shows_each_model_and_what_is_wrong_with_the_broken_ones(store: Path) -> None:
    result = run(store, "list")
    assert result.stdout.splitlines()[1].split() == [
        *("cells@1", "faster_rcnn", "resnet18_fpn", "roi_align", "2", "2.0")
    ]
    assert [line.rstrip() for line in result.stdout.splitlines()[2:]] == [
        "cells@2 *",
        "* what the name alone stands for",
    ]
    assert "cells@2 is broken:" in result.stderr
    assert "model.toml: no such file" in result.stderr


def test_list_as_json_has_the_same_facts(store: Path) -> None:
    whole, broken = json.loads(run(store, "list", "--json").stdout)
    assert (whole["model"], whole["labels"], whole["megabytes"], whole["problem"]) == ("cells@1", 2, 2.0, None)
    assert (broken["version"], broken["architecture"]) == (2, None)
    assert (whole["precision"], whole["is_default"], broken["is_default"]) == ("float32", False, True)


def test_show_prints_the_model_toml(store: Path) -> None:
    result = run(store, "show", "cells@1")
    assert "2.0 MB of weights" in result.stdout
    assert 'licence = "CC0-1.0"' in result.stdout


def test_show_as_json_holds_the_whole_model_toml(store: Path) -> None:
    shown = json.loads(run(store, "show", "cells@1", "--json").stdout)
    assert shown["model_toml"]["roi"]["box_output_size"] == 7


@pytest.fixture
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of two classes, as a training script would have saved it, labels and model.toml beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    network = build_model(builder_config("fasterrcnn_mobilenet_v3_large_320_fpn", ("a", "b")))
    torch.save({"model": network.state_dict()}, folder / "model.pth")
    (folder / "labels.txt").write_text("cat\ndog\n")
    (folder / "model.toml").write_text(
        'architecture = "faster_rcnn"\nlabels = ["a", "b"]\n'
        '[backbone]\nname = "mobilenet_v3_large_fpn"\nnorm_eps = 0.001\n'
        "[anchors]\nsizes = [[32, 64, 128, 256, 512], [32, 64, 128, 256, 512], [32, 64, 128, 256, 512]]\n"
    )
    return folder / "model.pth"


def test_import_stores_a_checkpoint_as_the_next_version(store: Path, checkpoint: Path) -> None:
    told = (
        "--architecture",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "--labels",
        str(checkpoint.with_name("labels.txt")),
    )
    result = run(store, "import", str(checkpoint), "--name", "cells", *told, "--dtype", "float16")
    assert "stored cells@3" in result.stdout
    stored = ModelStore(store).find("cells@3")
    assert (stored.problem, stored.model_toml.labels) == (None, ("cat", "dog"))
    assert (stored.model_toml.weights.dtype, stored.model_toml.weights.source) == ("float16", "model.pth")
    assert (stored.path / "README.md").read_text().startswith("# cells\n")


def test_import_takes_a_model_toml_instead_of_words(store: Path, checkpoint: Path) -> None:
    result = run(
        store, "import", str(checkpoint), "--name", "pets", "--model-config", str(checkpoint.with_name("model.toml"))
    )
    assert "stored pets@1" in result.stdout
    assert ModelStore(store).find("pets").model_toml.backbone.norm_eps == 0.001


def test_import_takes_a_model_toml_or_words_but_not_both(store: Path, checkpoint: Path) -> None:
    told = ("--model-config", str(checkpoint.with_name("model.toml")), "--architecture", "fasterrcnn_resnet50_fpn")
    result = run(store, "import", str(checkpoint), "--name", "pets", *told)
    assert result.exit_code == 2
    assert "give nothing else" in " ".join(result.stderr.replace("│", " ").split())


def test_a_refused_import_stores_nothing(store: Path, checkpoint: Path) -> None:
    result = run(store, "import", str(checkpoint), "--name", "pets")
    assert isinstance(result.exception, ModelStoreError)
    assert [model.name for model in ModelStore(store).list()] == ["cells", "cells"]


def test_pull_refuses_what_is_not_published_before_it_asks_any_server(store: Path) -> None:
    result = run(store, "pull", "yolo", "--base-url", "http://127.0.0.1:1")
    assert "no published weights for 'yolo'" in str(result.exception)


def test_pull_says_why_a_mirror_failed(store: Path) -> None:
    result = run(store, "pull", "maskrcnn_resnet50_fpn", "--base-url", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1/maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth: not complete" in str(result.exception)


def test_pull_takes_the_mirror_from_the_environment(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROISERVE_WEIGHTS_BASE_URL", "http://127.0.0.1:1/mirror/")
    result = run(store, "pull", "maskrcnn_resnet50_fpn")
    assert "http://127.0.0.1:1/mirror/maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth: not complete" in str(result.exception)


def test_import_takes_averaged_weights_when_told_to(store: Path, checkpoint: Path) -> None:
    state_dict = torch.load(checkpoint)["model"]
    averaged = {f"module.{key}": tensor * 0 for key, tensor in state_dict.items()}
    torch.save({"model": state_dict, "model_ema": {"n_averaged": torch.tensor(5), **averaged}}, checkpoint)
    described = ("--model-config", str(checkpoint.with_name("model.toml")))
    for name, options in {"plain": (), "mean": ("--averaged",)}.items():
        run(store, "import", str(checkpoint), "--name", name, *described, *options)
    key = "roi_heads.box_head.fc6.weight"
    assert ModelStore(store).find("plain").load_weights()[key].any()
    assert not ModelStore(store).find("mean").load_weights()[key].any()


@pytest.fixture
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of torchvision's parts, a picture, and what torchvision finds in it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("detector")
    trunk = models.mobilenetv2.mobilenet_v2(weights=None).features[:7]
    trunk.out_channels = 32
    network = FasterRCNN(
        trunk,
        4,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((8, 16, 32, 64, 128),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
    ).eval()
    pixels = blobs(64, 96)
    PIL.Image.fromarray(pixels).save(folder / "picture.png")
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    enliven(network, lambda: network([image]))
    with torch.no_grad():
        found = network([image])[0]
    answer = {key: found[key].tolist() for key in ("boxes", "labels", "scores")}
    (folder / "answer.json").write_text(json.dumps(answer))
    torch.save({"net": network.state_dict(), "class_names": ["a", "b", "c"]}, folder / "detector.pth")
    (folder / "rest.toml").write_text(
        "[transform]\nmin_size = 64\nmax_size = 96\n[anchors]\nsizes = [[8, 16, 32, 64, 128]]\n"
    )
    return folder


def checked(store: Path, folder: Path, *options: str) -> Result:
    told = ("--check", str(folder / "picture.png"), "--expect", str(folder / "answer.json"))
    return run(store, "import", str(folder / "detector.pth"), "--name", "parts", *told, *options)


def test_an_import_that_answers_otherwise_than_its_source_is_not_stored(store: Path, detector: Path) -> None:
    """The weights fit: their anchors have the usual number, and other sizes."""
    result = checked(store, detector)
    assert result.exit_code == 1
    assert "the import does not answer as its source" in result.stderr
    assert "[[32, 64, 128, 256, 512]]" in result.stdout
    assert not (store / "parts").exists()


def test_an_import_that_answers_as_its_source_says_so_and_what_was_assumed(store: Path, detector: Path) -> None:
    result = checked(store, detector, "--model-config", str(detector / "rest.toml"))
    assert result.exit_code == 0, result.output
    expected = len(json.loads((detector / "answer.json").read_text())["scores"])
    assert f"{expected} of {expected} expected detections found, {expected} found in all" in result.stdout
    assert "stored parts@1" in result.stdout
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    assert rows["anchors.sizes"].endswith("  given")
    assert rows["backbone.name"].endswith("  the weights")
    assert rows["transform.mean"].endswith("  assumed: torchvision's default")
    assert ModelStore(store).find("parts").model_toml.labels == ("a", "b", "c")
    card = (store / "parts" / "1" / "README.md").read_text()
    assert "| `transform.mean` | [0.485, 0.456, 0.406] | assumed: torchvision's default |" in card


def test_a_file_that_is_imported_twice_is_stored_once(store: Path, detector: Path) -> None:
    rest = ("--model-config", str(detector / "rest.toml"))
    file = str(detector / "detector.pth")
    assert "stored parts@1" in run(store, "import", file, "--name", "parts", *rest).stdout
    again = run(store, "import", file, "--name", "parts", *rest)
    assert again.exit_code == 0
    assert "parts@1 has these weights and settings already" in again.stdout
    assert "stored parts@2" in run(store, "import", file, "--name", "parts", *rest, "--dtype", "float16").stdout


def test_a_bad_name_is_refused_before_the_file_is_read(store: Path) -> None:
    result = run(store, "import", __file__, "--name", "Bad Name")
    assert "expected a model name" in str(result.exception)


@pytest.mark.parametrize("command", ["list", "show", "import", "pull"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"roiserve models {command}" in CliRunner().invoke(models_app, [command, "--help"]).stdout
