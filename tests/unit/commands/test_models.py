import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from service.commands.models import models_app
from service.model_store.model_toml import ProvenanceTable
from service.model_store.store import ModelStore
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


@pytest.mark.parametrize("command", ["list", "show"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"roiserve models {command}" in CliRunner().invoke(models_app, [command, "--help"]).stdout
