import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from service.errors import ModelNotFoundError, ModelStoreError
from service.model_store.model_toml import ProvenanceTable
from service.model_store.store import ModelStore, StoredModel
from service.modeling.config import BackboneConfig, ModelConfig

CONFIG = ModelConfig(architecture="faster_rcnn", labels=("cell",), backbone=BackboneConfig(name="resnet18_fpn"))


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def write(store: ModelStore, name: str, version: int = 1, *, weight: float = 1.0) -> StoredModel:
    return store.write_model(
        name,
        version,
        config=CONFIG,
        state_dict={"weight": torch.tensor([weight])},
        provenance=ProvenanceTable(data="none"),
        readme=f"# {name}\n",
    )


def test_a_written_model_is_found_and_holds_what_was_written(store: ModelStore) -> None:
    write(store, "cells", weight=3.0)
    model = store.find("cells")
    assert (model.key, model.problem) == ("cells@1", None)
    assert model.model_toml.labels == ("cell",)
    assert model.load_weights()["weight"].item() == 3.0
    assert (model.path / "README.md").read_text() == "# cells\n"


def test_a_name_alone_means_its_highest_version_by_number(store: ModelStore) -> None:
    for version in (2, 9, 10):
        write(store, "cells", version)
    assert store.find("cells").version == 10
    assert store.find("cells@2").version == 2
    assert store.next_version("cells") == 11
    assert store.next_version("other") == 1


def test_models_are_listed_by_name_and_version(store: ModelStore) -> None:
    for name, version in (("b", 10), ("b", 9), ("a", 1)):
        write(store, name, version)
    assert [model.key for model in store.list()] == ["a@1", "b@9", "b@10"]


@pytest.mark.parametrize(
    "reference", ["other", "cells@2", "cells@", "cells@01", "cells@1@1", "../store/cells", "", "Cells"]
)
def test_an_unknown_model_is_answered_with_the_known_ones(store: ModelStore, reference: str) -> None:
    write(store, "cells")
    with pytest.raises(ModelNotFoundError, match=r"known: cells@1$"):
        store.find(reference)


def test_a_broken_model_is_listed_with_its_problem_and_leaves_the_others_alone(store: ModelStore) -> None:
    write(store, "good")
    (write(store, "half").path / "model.toml").write_text("architecture = ")
    (write(store, "empty").path / "weights.safetensors").unlink()
    problems = {model.name: model.problem for model in store.list()}
    assert problems["good"] is None
    assert "not valid TOML" in str(problems["half"])
    assert "weights.safetensors: no such file" in str(problems["empty"])
    with pytest.raises(ModelStoreError, match="not valid TOML"):
        store.find("half").load_weights()


def test_absurd_folders_are_listed_with_their_problems_and_keep_nobody_waiting(store: ModelStore) -> None:
    write(store, "good")
    for name in ("pipe", "device", "folder", "huge"):
        (write(store, name).path / "model.toml").unlink()
    os.mkfifo(store.root / "pipe/1/model.toml")
    (store.root / "device/1/model.toml").symlink_to("/dev/zero")
    (store.root / "folder/1/model.toml").mkdir()
    with (store.root / "huge/1/model.toml").open("wb") as file:
        file.truncate(1 << 40)
    weights = write(store, "weights").weights_path
    weights.unlink()
    os.mkfifo(weights)
    problems = {model.name: str(model.problem) for model in store.list()}
    assert problems.pop("good") == "None"
    words = {"pipe": "a pipe", "device": "a device", "folder": "a folder", "huge": "at most", "weights": "a pipe"}
    assert [name for name, word in words.items() if word not in problems.pop(name)] == []
    assert problems == {}


def test_listing_needs_no_torch(store: ModelStore) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from service.model_store.store import ModelStore\n"
        "assert [model.problem for model in ModelStore(Path(sys.argv[1])).list()] == [None]\n"
        "print('torch' in sys.modules)\n"
    )
    write(store, "cells")
    command = [sys.executable, "-c", program, str(store.root)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


def test_folders_that_are_no_model_are_named(store: ModelStore) -> None:
    write(store, "cells")
    for folder in ("Cells/1", "cells/v2", "loose", ".git/1"):
        (store.root / folder).mkdir(parents=True)
    (store.root / "README.md").touch()
    assert [model.key for model in store.list()] == ["cells@1"]
    first, second, third = store.misplaced()
    assert first.startswith(f"{store.root}/Cells: expected a model name")
    assert second == f"{store.root}/cells/v2: expected a version number such as 1, 2, 3, got 'v2'"
    assert third.startswith(f"{store.root}/loose: expected a folder for each version")


def test_a_missing_store_is_said_to_be_missing(store: ModelStore) -> None:
    with pytest.raises(ModelStoreError, match="no model store at"):
        store.list()


def test_a_stored_model_is_never_overwritten(store: ModelStore) -> None:
    write(store, "cells", weight=1.0)
    with pytest.raises(ModelStoreError, match="exists already"):
        write(store, "cells", weight=2.0)
    assert store.find("cells").load_weights()["weight"].item() == 1.0


def test_a_failed_write_leaves_nothing_behind(store: ModelStore) -> None:
    with pytest.raises(ModelStoreError, match="finite"):
        write(store, "cells", weight=float("nan"))
    assert list((store.root / "cells").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "version"), [("../cells", 1), ("Cells", 1), ("", 1), ("a/b", 1), (".a", 1), ("cells", 0)]
)
def test_names_that_leave_the_store_or_could_not_be_found_are_refused(
    store: ModelStore, name: str, version: int
) -> None:
    with pytest.raises(ModelStoreError, match=r"expected a (model name|version number)"):
        write(store, name, version)
    assert not store.root.exists()


def test_a_name_stands_for_the_version_that_the_file_default_says(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    for version in ("1", "2", "10"):
        (tmp_path / "cells" / version).mkdir(parents=True)
    assert store.find("cells").key == "cells@10"
    (tmp_path / "cells" / "default").write_text("2\n")
    assert store.find("cells").key == "cells@2"
    assert store.find("cells@10").key == "cells@10"
    assert [one.version for one in store.by_preference(store.list())] == [2, 10, 1]


@pytest.mark.parametrize("text", ["", "3", "newest", "x" * 1000])
def test_a_default_that_is_no_version_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "cells" / "1").mkdir(parents=True)
    (tmp_path / "cells" / "default").write_text(text)
    with pytest.raises(ModelStoreError, match="expected one of the versions 1, got"):
        ModelStore(tmp_path).find("cells")
    (line,) = ModelStore(tmp_path).misplaced()
    assert line.startswith(f"{tmp_path}/cells/default: expected one of the versions 1, got")
