"""torchvision's published detectors, trained on COCO: by builder, with the size and the full sha256 of each file. URLs,
labels and figures are torchvision's own; it publishes only the first eight digits of the hashes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torchvision.models import get_model_weights  # type: ignore[attr-defined]  # exported, but not by name

from service.errors import ModelStoreError
from service.model_store.labels import category_labels
from service.model_store.torchvision_layout import BUILDERS

# torchvision's `overwrite_eps`: these two were trained with norms whose eps is 0.
_WITHOUT_NORM_EPS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn")

_FILES = {
    "fasterrcnn_resnet50_fpn": (
        "258fb6c638b15964ddcdd1ae0748c5eef1be9e732750120cc857feed3faac384",
        167_502_836,
    ),
    "fasterrcnn_resnet50_fpn_v2": (
        "dd69338a24b8d7381807e247652bdc356325bcbaf1cd3e092e00e0a1a58706bf",
        175_221_657,
    ),
    "fasterrcnn_mobilenet_v3_large_fpn": (
        "fb6a3cc702b1df54c18a44b26708cd083614211062d0c36d2ca7bf9270df3533",
        77_844_807,
    ),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (
        "907ea3f91ff92242bc1baea8049276a3e76bca48ce7560bd268cc029f37977b5",
        77_844_807,
    ),
    "maskrcnn_resnet50_fpn": (
        "bf2d0c1efbc936eeee2bc95a48e80ebc86b891f61b0106485937fc29f9315fc0",
        178_090_079,
    ),
    "maskrcnn_resnet50_fpn_v2": (
        "73cbd0190fcbe3ba339921fbce2c3a0b6bb9126c9a133c85e43a2a8e060a109e",
        185_828_065,
    ),
}
"""The sha256 and the size in bytes of each builder's file; docs/model-store.md gives the source of the hashes."""


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """One published file.

    Attributes:
        builder: torchvision builder's name.
        url: the last part is the file name, with the first digits of its sha256.
        sha256: of the whole file, in hexadecimal.
        size: in bytes.
        labels: class names without the background; ids that COCO does not use are called "unused 12".
        norm_eps: of the trunk's norms.
        metrics: torchvision's figures on COCO val2017, such as `box_map`.
    """

    builder: str
    url: str
    sha256: str
    size: int
    labels: tuple[str, ...]
    norm_eps: float = 1e-5
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]


def published_weights(builder: str) -> PublishedWeights:
    """What torchvision has published for a builder.

    Raises:
        ModelStoreError: there is nothing for this builder (the message lists the others), or the installed
            torchvision's file is not the one whose hash is known.
    """
    if builder not in BUILDERS:
        raise ModelStoreError(f"no published weights for {builder!r}; there are some for: {', '.join(BUILDERS)}")
    weights = get_model_weights(builder)["COCO_V1"].value
    sha256, size = _FILES[builder]
    if f"-{sha256[:8]}." not in weights.url:
        raise ModelStoreError(f"this torchvision has published {weights.url}, whose hash is not known here")
    return PublishedWeights(
        builder=builder,
        url=weights.url,
        sha256=sha256,
        size=size,
        labels=category_labels(weights.meta["categories"][1:]),
        norm_eps=0.0 if builder in _WITHOUT_NORM_EPS else 1e-5,
        metrics=weights.meta["_metrics"]["COCO-val2017"],
    )


def find_published(sha256: str) -> PublishedWeights | None:
    """The published file with this hash, if it is one."""
    return next((published_weights(builder) for builder, (known, _) in _FILES.items() if known == sha256), None)
