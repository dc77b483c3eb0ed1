"""From a checkpoint that somebody has to a model of ours: read it, find out which network it is of, name its classes,
and prove that every weight has its place. Called by `roiserve models import` and by `pull.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from service.errors import ModelStoreError
from service.model_store.checkpoint import read_checkpoint
from service.model_store.detectron2_layout import detectron2_config, is_detectron2, with_torchvision_names
from service.model_store.files import sha256_of
from service.model_store.model_card import model_card
from service.model_store.model_toml import Dtype, ProvenanceTable
from service.model_store.published import category_labels, find_published
from service.model_store.store import ModelStore, StoredModel
from service.model_store.torchvision_layout import (
    builder_config,
    inferred_config,
    num_labels,
    with_current_names,
    with_norm_of,
)
from service.model_store.weights import load_into
from service.modeling.build import build_model
from service.modeling.config import ModelConfig


@dataclass(frozen=True, slots=True, eq=False)
class ImportedModel:
    """A checkpoint's network and its weights under our names, as `ModelStore.write_model` takes them."""

    config: ModelConfig
    state_dict: Mapping[str, Tensor]


def import_checkpoint(
    path: Path,
    *,
    labels: Sequence[str] | None = None,
    architecture: str | None = None,
    norm_eps: float | None = None,
    averaged: bool = False,
) -> ImportedModel:
    """Read a checkpoint, of torchvision's layout or detectron2's, into the network that it is of.

    A file that torchvision has published is known by its hash and needs no words.

    Args:
        labels: class names without the background, in the order of the weights.
        architecture: a torchvision builder's name; None infers it from the weights.
        norm_eps: of the trunk's norms, which nothing in the weights tells; None is 1e-5.
        averaged: take the weights averaged over training that the file has beside the others.

    Raises:
        ModelStoreError: the checkpoint cannot be read, or does not fit the network and the labels key by key.
    """
    original = read_checkpoint(path, averaged=averaged)
    if published := find_published(sha256_of(path)):
        labels, architecture = labels or published.labels, architecture or published.builder
        norm_eps = published.norm_eps if norm_eps is None else norm_eps
    try:
        state_dict = _in_torchvision_layout(original)
        labels = _checked_labels(labels, num_labels(state_dict))
        if is_detectron2(original):
            config = _detectron2_config(original, labels, architecture, norm_eps)
        else:
            config = _torchvision_config(state_dict, labels, architecture, 1e-5 if norm_eps is None else norm_eps)
    except ModelStoreError as error:
        raise ModelStoreError(f"{path}: {error}") from error
    return _fitted(path, config, state_dict)


def import_with_config(path: Path, config: ModelConfig, *, averaged: bool = False) -> ImportedModel:
    """Read a checkpoint, of torchvision's layout or detectron2's, into the network that `config` describes.

    Raises:
        ModelStoreError: as `import_checkpoint`.
    """
    original = read_checkpoint(path, averaged=averaged)
    return _fitted(path, config, _in_torchvision_layout(original))


def _in_torchvision_layout(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return with_torchvision_names(original) if is_detectron2(original) else with_current_names(original)


def _detectron2_config(
    original: Mapping[str, Tensor], labels: Sequence[str], architecture: str | None, norm_eps: float | None
) -> ModelConfig:
    if architecture is not None or norm_eps is not None:
        raise ModelStoreError("a detectron2 checkpoint tells its architecture itself: leave out what describes it")
    return detectron2_config(original, labels)


def _torchvision_config(
    state_dict: Mapping[str, Tensor], labels: Sequence[str], architecture: str | None, norm_eps: float
) -> ModelConfig:
    if architecture is None:
        config = inferred_config(state_dict, labels, norm_eps=norm_eps)
    else:
        config = builder_config(architecture, labels, norm_eps=norm_eps)
    return with_norm_of(state_dict, config)


def _checked_labels(labels: Sequence[str] | None, num_labels: int) -> Sequence[str]:
    if labels is None:
        raise ModelStoreError(f"the weights know {num_labels} classes: name them with --labels, background left out")
    if len(labels) != num_labels:
        hint = "; leave the background out" if len(labels) == num_labels + 1 else ""
        raise ModelStoreError(
            f"wrong class count: the weights know {num_labels} classes, got {len(labels)} labels{hint}"
        )
    return labels


def _fitted(path: Path, config: ModelConfig, state_dict: Mapping[str, Tensor]) -> ImportedModel:
    network = build_model(config)
    load_into(network, state_dict, source=str(path))
    return ImportedModel(config, network.state_dict())


def read_labels(path: Path) -> tuple[str, ...]:
    """The labels in a file: one on each line, empty lines at the end left out.

    torchvision's own list of COCO's categories is understood too: `__background__` on its first line is left out, and
    the ids that it calls `N/A` get the names that `published_weights` gives them.

    Raises:
        ModelStoreError: not readable, not UTF-8, or with an empty line in between.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except OSError as error:
        raise ModelStoreError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelStoreError(f"{path}: expected UTF-8 text, got the byte {error.object[error.start]:#04x}") from error
    if "" in lines:
        raise ModelStoreError(f"{path}: expected a label on each line, got none on line {lines.index('') + 1}")
    return category_labels(lines[1:] if lines[:1] == ["__background__"] else lines)


def store_imported(
    store: ModelStore,
    imported: ImportedModel,
    *,
    name: str,
    provenance: ProvenanceTable,
    source: str,
    dtype: Dtype = "float32",
) -> StoredModel:
    """Store an imported model as the next version of `name`, with a model card of what is known.

    Args:
        source: the file or URL that it came from.
        dtype: how the weights are stored.

    Raises:
        ModelStoreError: a bad name, or a store that cannot be written.
    """
    return store.write_model(
        name,
        store.next_version(name),
        config=imported.config,
        state_dict=imported.state_dict,
        provenance=provenance,
        readme=model_card(name, imported.config, provenance),
        dtype=dtype,
        source=source,
    )
