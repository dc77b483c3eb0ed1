"""Published weights of a trunk (torchvision's classifiers, timm's models) as the backbone's of a detector."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from service.errors import ModelStoreError
from service.model_store.checkpoint import read_checkpoint
from service.modeling.build import build_model
from service.modeling.config import ModelConfig

# An R-CNN keeps its trunk in the branch that sees the crops.
_BODIES = ("backbone.body.", "roi_heads.box_roi_pool.backbone.body.")
_RES5 = "roi_heads.box_head."  # ResNet's layer4 where it is the box head
_LISTED = 8


def load_trunk_weights(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """A trunk's weights under the names that they have in the network.

    Args:
        path: a checkpoint, such as torchvision's `resnet50-….pth` or timm's `model.safetensors`; read without running
            code from it. What lies behind the trunk, such as a classifier, is passed over.
        config: the network; its backbone says which trunk is expected.

    Raises:
        ModelStoreError: no checkpoint, or of another trunk; names the weights that are missing, of another shape, or of
            parts that the trunk does not have.
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
    """What the trunk itself calls a weight of the detector; None for a weight of another part."""
    for body in _BODIES:
        if key.startswith(body):
            return key.removeprefix(body)
    return key.removeprefix(_RES5) if key.startswith(f"{_RES5}layer4.") else None


def _plain(name: str) -> str:
    """A weight's name with what differs between a bare trunk and one in a classifier or a list of maps evened out.

    torchvision's MobileNet and VGG keep their trunk in `features`; timm names `stages.0` as `stages_0` where a model
    gives its maps, and keeps some models in `model`.
    """
    for prefix in ("backbone.body.", "backbone.", "features.", "model."):
        name = name.removeprefix(prefix)
    return re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", name)


def _lies_behind(name: str, names: Mapping[str, str]) -> bool:
    """Whether it is of a numbered part behind the last one that the trunk has, as of MobileNet's last convolution."""
    first = name.split(".")[0]
    numbers = [int(one.split(".")[0]) for one in names.values() if one.split(".")[0].isdecimal()]
    return first.isdecimal() and bool(numbers) and int(first) > max(numbers)


def _listing(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{what}: {', '.join(names[:_LISTED])}{more}" if names else ""
