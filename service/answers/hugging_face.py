"""Encodes detections as Hugging Face's tasks `object-detection` and `image-segmentation` answer them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.answers.array import ArrayEncoder
from service.structures import Detections, HuggingFace, Image, ModelInfo

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class HuggingFaceEncoder(ArrayEncoder):
    """See the module."""

    smaller = "object-detection"
    fewer = "a higher threshold"

    def __init__(self, form: HuggingFace) -> None:
        super().__init__("png" if form.with_masks else "none")

    def objects(
        self, image: Image, part: Detections, masks: Sequence[Any] | None, info: ModelInfo
    ) -> list[dict[str, object]]:
        """`label`, `score`, `box` and, with masks, `mask`: a PNG of the image's size in base64."""
        # Truncated to whole pixels, as in the library's own pipelines.
        boxes = part.boxes.astype(int).tolist()
        found: list[dict[str, object]] = [
            {"label": info.labels[label_id - 1], "score": score, "box": dict(zip(_CORNERS, box, strict=True))}
            for box, label_id, score in zip(boxes, part.labels.tolist(), part.scores, strict=True)
        ]
        for one, mask in zip(found, masks or (), strict=masks is not None):
            one["mask"] = mask
        return found
