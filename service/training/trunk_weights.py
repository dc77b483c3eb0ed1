"""Load published weights of a trunk (torchvision's classifiers, timm's models) into a detector's backbone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from service.errors import ModelStoreError
from service.model_store.checkpoint import read_checkpoint
from service.modeling.build import build_model
from service.modeling.config import ModelConfig

# An R-CNN has its trunk in the branch that processes the crops.
_BODIES = ("backbone.body.", "roi_heads.box_roi_pool.backbone.body.")
_RES5 = "roi_heads.box_head."  # ResNet's layer4 if it is the box head
_LISTED = 8


def load_trunk_weights(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """A trunk's weights under their names in the detector.

    Args:
        path: a checkpoint, such as torchvision's `resnet50-….pth` or timm's `model.safetensors`; read without running
            code from it. Anything after the trunk, such as a classifier, is skipped.
        config: the network; its backbone determines which trunk is expected.

    Raises:
        ModelStoreError: not a checkpoint, or of another trunk; the message names the weights that are missing, have
            another shape, or belong to parts that the trunk lacks.
    """
    given = {_plain(key): value for key, value in read_checkpoint(path).weights.items()}
    expected = build_model(config).state_dict()
    names = {key: _plain(name) for key in expected if (name := _name_in_trunk(key)) is not None}
    needed = {key: name for key, name in names.items() if not key.endswith(".num_batches_tracked")}
    fitting = {key: given[name] for key, name in names.items() if name in given}
    parts = {name.split(".")[0] for name in names.values()}
    stages = {".".join(name.split(".")[:2]) for name in names.values()}
    problems = [
        _listing("missing", sorted(name for name in needed.values() if name not in given)),
        _listing(
            "of another shape",
            [
                f"{names[key]} (expected {tuple(expected[key].shape)}, got {tuple(value.shape)})"
                for key, value in fitting.items()
                if value.shape != expected[key].shape
            ],
        ),
        _listing(
            "of parts that the trunk does not have",
            [
                name
                for name in given
                if name.split(".")[0] in parts
                and ".".join(name.split(".")[:2]) not in stages
                and not name.endswith("num_batches_tracked")
                and not _lies_behind(name, names)
            ],
        ),
    ]
    if found := [problem for problem in problems if problem]:
        raise ModelStoreError(
            "\n  ".join([f"{path}: expected the weights of the trunk of {config.backbone.name}, got others", *found])
        )
    return fitting


def _name_in_trunk(key: str) -> str | None:
    """The trunk's own name for a weight of the detector; None for a weight of another part."""
    for body in _BODIES:
        if key.startswith(body):
            return key.removeprefix(body)
    return key.removeprefix(_RES5) if key.startswith(f"{_RES5}layer4.") else None


def _plain(name: str) -> str:
    """A weight's name, normalised so that it is the same for a bare trunk, a classifier, and a model that returns
    feature maps.

    torchvision's MobileNet and VGG keep their trunk in `features`; timm names `stages.0` as `stages_0` if a model
    returns feature maps, and wraps some models in `model`.
    """
    for prefix in ("backbone.body.", "backbone.", "features.", "model."):
        name = name.removeprefix(prefix)
    return re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", name)


def _lies_behind(name: str, names: Mapping[str, str]) -> bool:
    """Whether it belongs to a numbered part after the trunk's last one, such as MobileNet's last convolution."""
    first = name.split(".")[0]
    numbers = [int(one.split(".")[0]) for one in names.values() if one.split(".")[0].isdecimal()]
    return first.isdecimal() and bool(numbers) and int(first) > max(numbers)


def _listing(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{what}: {', '.join(names[:_LISTED])}{more}" if names else ""
