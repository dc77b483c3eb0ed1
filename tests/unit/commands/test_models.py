import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from service.commands.models import models_app
from service.errors import ModelStoreError
from service.model_store.model_toml import ProvenanceTable
from service.model_store.store import ModelStore
from service.model_store.torchvision_layout import builder_config
from service.modeling.build import build_model
from service.modeling.config import BackboneConfig, ModelConfig


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
    assert result.stdout.splitlines()[1].split() == ["cells@1", "faster_rcnn", "resnet18_fpn", "roi_align", "2", "2.0"]
    assert "cells@2 is broken:" in result.stderr
    assert "model.toml: no such file" in result.stderr


def test_list_as_json_has_the_same_facts(store: Path) -> None:
    whole, broken = json.loads(run(store, "list", "--json").stdout)
    assert (whole["model"], whole["labels"], whole["megabytes"], whole["problem"]) == ("cells@1", 2, 2.0, None)
    assert (broken["version"], broken["architecture"]) == (2, None)


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


@pytest.mark.parametrize("command", ["list", "show", "import", "pull"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"roiserve models {command}" in CliRunner().invoke(models_app, [command, "--help"]).stdout
