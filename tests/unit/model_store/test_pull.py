import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from typer.testing import CliRunner, Result

from service.cli import app
from service.errors import ModelStoreError
from service.model_store.published import PublishedWeights, published_weights
from service.model_store.pull import find_pulled, pull_model
from service.model_store.store import ModelStore, StoredModel
from service.model_store.torchvision_layout import BUILDERS, builder_config
from service.modeling.config import ModelConfig
from tests.random_detectors import with_backbone
from tests.unit.model_store.test_importing import with_old_names

BUILDER = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


@pytest.fixture
def weights(file_server: Any, build: Callable[..., nn.Module], tmp_path: Path) -> PublishedWeights:
    """What somebody has published on `file_server`."""
    path = tmp_path / "published.pth"
    torch.save(build(BUILDER, num_classes=3).state_dict(), path)
    file_server.content = path.read_bytes()
    sha256 = hashlib.sha256(file_server.content).hexdigest()
    url = f"https://example.org/models/{BUILDER}-{sha256[:8]}.pth"
    return PublishedWeights(
        builder=BUILDER,
        url=url,
        sha256=sha256,
        size=len(file_server.content),
        labels=("a", "b"),
        norm_eps=0.0,
        metrics={"box_map": 22.8},
    )


def pull(store: ModelStore, weights: PublishedWeights, base_url: str) -> StoredModel:
    return pull_model(
        store, weights, name="mine", command="a command", on_progress=lambda present, total: None, base_url=base_url
    )


def test_published_weights_become_a_model_that_says_where_it_is_from(
    file_server: Any, weights: PublishedWeights, store: ModelStore
) -> None:
    stored = pull(store, weights, file_server.base_url)
    model_toml = stored.model_toml
    assert (stored.key, model_toml.labels, model_toml.backbone.norm_eps) == ("mine@1", ("a", "b"), 0.0)
    assert model_toml.weights.source == file_server.base_url + weights.file_name
    assert (model_toml.provenance.command, model_toml.provenance.metrics) == ("a command", {"box_map": 22.8})
    assert weights.sha256 in str(model_toml.provenance.notes)
    assert "COCO" in (stored.path / "README.md").read_text()
    assert stored.load_weights()
    assert [path for path, _ in file_server.asked] == [f"/models/{weights.file_name}"]


def test_the_downloaded_file_is_kept_only_until_it_is_imported(
    file_server: Any, weights: PublishedWeights, store: ModelStore
) -> None:
    file_server.cut_after_bytes = [1000, 0, 0, 0, 0]
    with pytest.raises(ModelStoreError, match="not complete"):
        pull(store, weights, file_server.base_url)
    assert (store.list(), store.misplaced()) == ([], [])
    pull(store, weights, file_server.base_url)
    assert file_server.asked[-1][1] == "bytes=1000-"
    assert [path.name for path in store.root.iterdir()] == ["mine"]


def test_weights_that_are_there_already_are_found_wherever_they_came_from(
    file_server: Any, weights: PublishedWeights, store: ModelStore
) -> None:
    assert find_pulled(store, weights, name="mine") is None
    stored = pull(store, weights, file_server.base_url)
    assert find_pulled(store, weights, name="mine") == stored
    assert find_pulled(store, weights, name="other") is None


def published_file(builder: str, path: Path) -> dict[str, Tensor]:
    """Write a file in the layout that torchvision published for a builder; returns its weights by their current names.

    Every weight is one number of its own, repeated: whole ones would be 200 MB.
    """
    with torch.device("meta"):
        network: nn.Module = getattr(detection, builder)(weights=None, weights_backbone=None)
    state_dict = {
        key: torch.tensor(number, dtype=tensor.dtype).expand(tensor.shape)
        for number, (key, tensor) in enumerate(network.state_dict().items())
    }
    # All but the second version are from before the names changed, and have norms that did not train.
    torch.save(state_dict if builder.endswith("_v2") else with_old_names(state_dict), path)
    return {key: tensor for key, tensor in state_dict.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("builder", BUILDERS)
def test_each_published_file_becomes_the_model_of_its_builder(
    builder: str, file_server: Any, store: ModelStore, tmp_path: Path
) -> None:
    expected = published_file(builder, tmp_path / "published.pth")
    file_server.content = (tmp_path / "published.pth").read_bytes()
    sha256 = hashlib.sha256(file_server.content).hexdigest()
    url = f"https://example.org/{builder}_coco-{sha256[:8]}.pth"
    weights = replace(published_weights(builder), url=url, sha256=sha256, size=len(file_server.content))
    stored = pull(store, weights, file_server.base_url)
    model_toml = stored.model_toml
    config = builder_config(builder, weights.labels, norm_eps=weights.norm_eps)
    norm = "batch_norm" if builder.endswith("_v2") else "frozen_batch_norm"
    assert {name: getattr(model_toml, name) for name in ModelConfig.model_fields} == dict(
        with_backbone(config, norm=norm)
    )
    found = stored.load_weights()
    found = {key: tensor for key, tensor in found.items() if not key.endswith("num_batches_tracked")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("told_by", ["--base-url", "ROISERVE_WEIGHTS_BASE_URL"])
def test_the_command_shows_progress_stores_the_model_and_downloads_nothing_twice(
    told_by: str, file_server: Any, weights: PublishedWeights, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No file of a test has the hash of a published one.
    monkeypatch.setattr("service.model_store.published.published_weights", lambda builder: weights)
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
    option = [told_by, file_server.base_url] if told_by == "--base-url" else []
    command = ["models", "pull", BUILDER, "--store", str(store.root), *option]

    def pull() -> Result:
        return runner.invoke(app, command, env={} if option else {told_by: file_server.base_url})

    first, second = pull(), pull()
    assert (first.exit_code, second.exit_code) == (0, 0), (first.output, second.output)
    megabytes = f"{len(file_server.content) / 1e6:.1f}"
    assert re.search(rf"{weights.file_name} .*{megabytes}/{megabytes} MB", first.stderr)
    where = f"{BUILDER}@1 in {store.root / BUILDER / '1'}"
    assert first.stdout == f"stored {where}: faster_rcnn on mobilenet_v3_large_fpn, 2 labels\n"
    assert second.stdout == f"{BUILDER}@1 has these weights already, in {store.root / BUILDER / '1'}\n"
    assert [path for path, _ in file_server.asked] == [f"/models/{weights.file_name}"]
    assert store.find(BUILDER).problem is None
