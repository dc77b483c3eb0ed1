import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from service.errors import ModelStoreError
from service.model_store.published import PublishedWeights
from service.model_store.pull import find_pulled, pull_model
from service.model_store.store import ModelStore, StoredModel

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
    return PublishedWeights(builder=BUILDER, url=url, labels=("a", "b"), norm_eps=0.0, metrics={"box_map": 22.8})


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
