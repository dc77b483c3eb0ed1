"""What torchvision has published: its detectors trained on COCO, by builder. Holds no list of its own;
torchvision has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torchvision.models import get_model_weights  # type: ignore[attr-defined]  # exported, but not by name

from service.errors import ModelStoreError
from service.model_store.labels import category_labels
from service.model_store.torchvision_layout import BUILDERS

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth$")
# torchvision's `overwrite_eps`: these two were trained with norms that add nothing to the variance.
_WITHOUT_NORM_EPS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn")


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """One published file.

    Attributes:
        builder: torchvision builder's name.
        url: where it is; the last part names the file and holds the first digits of its sha256.
        labels: class names without the background; ids that COCO does not use are called "unused 12".
        norm_eps: of the trunk's norms.
        metrics: torchvision's figures on COCO val2017, such as `box_map`.
    """

    builder: str
    url: str
    labels: tuple[str, ...]
    norm_eps: float = 1e-5
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def sha256_prefix(self) -> str:
        """The first digits of the file's sha256."""
        match = _HASH_IN_NAME.search(self.url)
        assert match, f"{self.url} holds no hash"
        return match[1]


def published_weights(builder: str) -> PublishedWeights:
    """What torchvision has published for a builder.

    Raises:
        ModelStoreError: nothing; lists those for which there is something.
    """
    if builder not in BUILDERS:
        raise ModelStoreError(f"no published weights for {builder!r}; there are some for: {', '.join(BUILDERS)}")
    weights = get_model_weights(builder)["COCO_V1"].value
    return PublishedWeights(
        builder=builder,
        url=weights.url,
        labels=category_labels(weights.meta["categories"][1:]),
        norm_eps=0.0 if builder in _WITHOUT_NORM_EPS else 1e-5,
        metrics=weights.meta["_metrics"]["COCO-val2017"],
    )


def find_published(sha256: str) -> PublishedWeights | None:
    """The published file with this hash, if it is one."""
    every = (published_weights(builder) for builder in BUILDERS)
    return next((weights for weights in every if sha256.startswith(weights.sha256_prefix)), None)
