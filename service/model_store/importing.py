"""Import a checkpoint: read it, identify its network, name its classes, and verify that every weight has its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.errors import ModelStoreError
from service.model_store import detectron2_layout, mmdetection_layout
from service.model_store.checkpoint import Checkpoint, read_checkpoint
from service.model_store.files import sha256_of
from service.model_store.findings import Findings
from service.model_store.labels import Labels
from service.model_store.model_card import model_card
from service.model_store.model_toml import Dtype, ProvenanceTable
from service.model_store.published import find_published
from service.model_store.store import ModelStore, StoredModel
from service.model_store.torchvision_layout import (
    builder_findings,
    inferred,
    num_labels,
    tell_norm,
    with_class_specific_outputs,
    with_current_names,
)
from service.model_store.weights import check_fits, load_into, serialised_sha256
from service.modeling.build import build_model
from service.modeling.config import ModelConfig

Given = Mapping[str, Any]
"""A document of `model.toml`, or a part of one."""


@dataclass(frozen=True, slots=True, eq=False)
class ImportedModel:
    """A checkpoint's network and its weights under our names, in the form that `ModelStore.write_model` takes.

    Attributes:
        rows: the settings that affect its results: key, value, and the value's source.
        notes: other things its owner should know.
    """

    config: ModelConfig
    state_dict: Mapping[str, Tensor]
    rows: Sequence[tuple[str, str, str]] = ()
    notes: Sequence[str] = field(default=())


def import_checkpoint(
    path: Path,
    *,
    labels: Labels | Sequence[str] | None = None,
    architecture: str | None = None,
    given: Given | None = None,
    norm_eps: float | None = None,
    averaged: bool = False,
    input_format: str | None = None,
) -> ImportedModel:
    """Read a checkpoint in torchvision's, detectron2's or mmdetection's layout, and build its network.

    Files published by torchvision are recognised by their hash and need no options.

    Args:
        labels: class names, in the order of the weights; None takes those in the file or in `given`.
        architecture: a torchvision builder's name; None infers it from the weights.
        given: settings that the weights do not determine, as a `model.toml` or a part of one.
        norm_eps: of the trunk's norms, which the weights do not determine; None means 1e-5.
        averaged: take the weights averaged over training, which the file has beside the others.
        input_format: channel order of the first convolution, `rgb` or `bgr`; None takes it from the file, or else the
            family's default.

    Raises:
        ModelStoreError: the checkpoint cannot be read, does not determine the network, or does not fit the network and
            the labels key by key.
    """
    checkpoint = read_checkpoint(path, averaged=averaged)
    given = dict(given or {})
    if published := find_published(sha256_of(path)):
        labels, architecture = labels or published.labels, architecture or published.builder
        norm_eps = published.norm_eps if norm_eps is None else norm_eps
    if norm_eps is not None:
        given["backbone"] = {**given.get("backbone", {}), "norm_eps": norm_eps}
    try:
        state_dict, repeated = with_class_specific_outputs(_in_torchvision_layout(checkpoint, input_format))
        count = num_labels(state_dict)
        if labels is not None or "labels" not in given:
            given["labels"] = _labels(labels, checkpoint, count)
        found = _findings(checkpoint, state_dict, architecture, given, input_format)
        config = found.answered(given)
    except ModelStoreError as error:
        raise ModelStoreError(f"{path}: {error}") from error
    notes = [*_notes(checkpoint), *repeated, *found.notes]
    return _fitted(path, config, state_dict, rows=list(found.rows(config, given)), notes=notes)


def _in_torchvision_layout(checkpoint: Checkpoint, input_format: str | None) -> dict[str, Tensor]:
    weights = checkpoint.weights
    if detectron2_layout.is_detectron2(weights):
        return detectron2_layout.with_torchvision_names(weights, input_format=input_format)
    if mmdetection_layout.is_mmdetection(weights):
        return mmdetection_layout.with_torchvision_names(
            weights, config_text=checkpoint.config_text, input_format=input_format
        )
    renamed = with_current_names(weights)
    first = next((key for key, one in renamed.items() if key.startswith("backbone.body.") and one.ndim == 4), None)
    if input_format == "bgr" and first is not None:
        renamed[first] = renamed[first].flip(1)
    return renamed


def _findings(
    checkpoint: Checkpoint,
    state_dict: Mapping[str, Tensor],
    architecture: str | None,
    given: Given,
    input_format: str | None,
) -> Findings:
    """What is known about the network; nothing if `given` describes it completely."""
    weights = checkpoint.weights
    if {"architecture", "backbone"} <= given.keys() and "name" in given["backbone"]:
        return Findings(family="given")
    if detectron2_layout.is_detectron2(weights):
        _refuse_a_builder(architecture, "detectron2")
        return detectron2_layout.detectron2_findings(weights, input_format=input_format)
    if mmdetection_layout.is_mmdetection(weights):
        _refuse_a_builder(architecture, "mmdetection")
        return mmdetection_layout.mmdetection_findings(
            weights, config_text=checkpoint.config_text, input_format=input_format
        )
    if architecture is None:
        return inferred(state_dict)
    found = builder_findings(architecture)
    tell_norm(found, state_dict)
    return found


def _refuse_a_builder(architecture: str | None, family: str) -> None:
    if architecture is not None:
        raise ModelStoreError(f"a {family} checkpoint tells its architecture itself: leave --architecture out")


def _labels(labels: Labels | Sequence[str] | None, checkpoint: Checkpoint, count: int) -> tuple[str, ...]:
    if labels is not None:
        return (labels if isinstance(labels, Labels) else Labels(tuple(labels))).fitted(count)
    for names in checkpoint.labels:
        try:
            return Labels(names).fitted(count)
        except ModelStoreError:  # the list holds something else
            continue
    raise ModelStoreError(f"the weights know {count} classes: name them with --labels, background left out")


def _notes(checkpoint: Checkpoint) -> list[str]:
    notes = []
    if checkpoint.found_at:
        notes.append(f"the weights are under {checkpoint.found_at[:200]}")
    if checkpoint.left_out:
        some = ", ".join(key[:100] for key in checkpoint.left_out[:10])
        more = f" and {len(checkpoint.left_out) - 10} more" if len(checkpoint.left_out) > 10 else ""
        notes.append(f"left out, as they are not the detector's: {some}{more}")
    return notes


def _fitted(
    path: Path,
    config: ModelConfig,
    state_dict: Mapping[str, Tensor],
    *,
    rows: Sequence[tuple[str, str, str]],
    notes: Sequence[str],
) -> ImportedModel:
    # First on the meta device, which uses no memory: mismatched weights are rejected before a possibly huge network is
    # allocated.
    with torch.device("meta"):
        check_fits(build_model(config), {key: tuple(one.shape) for key, one in state_dict.items()}, source=str(path))
    network = build_model(config)
    load_into(network, state_dict, source=str(path))
    return ImportedModel(config, network.state_dict(), rows=rows, notes=notes)


def store_imported(
    store: ModelStore,
    imported: ImportedModel,
    *,
    name: str,
    provenance: ProvenanceTable,
    source: str,
    dtype: Dtype = "float32",
) -> StoredModel:
    """Store an imported model as the next version of `name`, with a model card.

    Args:
        source: the file or URL it came from.
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
        readme=model_card(name, imported.config, provenance, rows=imported.rows),
        dtype=dtype,
        source=source,
    )


def find_same(store: ModelStore, imported: ImportedModel, *, name: str, dtype: Dtype = "float32") -> StoredModel | None:
    """The version of `name` that has these weights and this configuration, if there is one.

    Raises:
        ModelStoreError: a weight is not a finite number, or does not fit `dtype`.
    """
    versions = [
        one for one in (store.list() if store.root.exists() else []) if one.name == name and one.problem is None
    ]
    if not versions:
        return None
    digest = serialised_sha256(imported.state_dict, dtype=dtype, source=name)
    fields = set(ModelConfig.model_fields)
    return next(
        (
            one
            for one in reversed(versions)
            if one.model_toml.weights.sha256 == digest
            and one.model_toml.model_dump(include=fields) == imported.config.model_dump(include=fields)
        ),
        None,
    )
