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
    path: Path, *, labels: Sequence[str] | None, architecture: str | None = None, norm_eps: float = 1e-5
) -> ImportedModel:
    """Read a checkpoint, of torchvision's layout or detectron2's, into the network that it is of.

    Args:
        labels: class names without the background, in the order of the weights; None is answered with their number.
        architecture: a torchvision builder's name; None infers it from the weights.
        norm_eps: of the trunk's norms; nothing in the weights tells it.

    Raises:
        ModelStoreError: the checkpoint cannot be read, or does not fit the network and the labels key by key.
    """
    original = read_checkpoint(path)
    try:
        state_dict = _in_torchvision_layout(original)
        labels = _checked_labels(labels, num_labels(state_dict))
        if is_detectron2(original):
            if architecture is not None:
                raise ModelStoreError("a detectron2 checkpoint tells its architecture itself: leave --architecture out")
            config = detectron2_config(original, labels)
        elif architecture is not None:
            config = with_norm_of(state_dict, builder_config(architecture, labels, norm_eps=norm_eps))
        else:
            config = with_norm_of(state_dict, inferred_config(state_dict, labels, norm_eps=norm_eps))
    except ModelStoreError as error:
        raise ModelStoreError(f"{path}: {error}") from error
    return _fitted(path, config, state_dict)


def import_with_config(path: Path, config: ModelConfig) -> ImportedModel:
    """Read a checkpoint, of torchvision's layout or detectron2's, into the network that `config` describes.

    Raises:
        ModelStoreError: as `import_checkpoint`.
    """
    original = read_checkpoint(path)
    return _fitted(path, config, _in_torchvision_layout(original))


def _in_torchvision_layout(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return with_torchvision_names(original) if is_detectron2(original) else with_current_names(original)


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
