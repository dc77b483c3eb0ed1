"""Encodes detections as COCO results, which `pycocotools.coco.COCO.loadRes` takes as they are.

Source: https://cocodataset.org/#format-results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from service.answers.array import ArrayEncoder
from service.structures import Coco, Detections, Image, ModelInfo


class CocoEncoder(ArrayEncoder):
    """See the module."""

    def __init__(self, form: Coco) -> None:
        super().__init__("rle" if form.with_masks else "none")
        self._form = form

    def objects(
        self, image: Image, part: Detections, masks: Sequence[Any] | None, info: ModelInfo
    ) -> list[dict[str, object]]:
        """`image_id`, `category_id`, `bbox` (x, y, width, height), `score` and, with masks, `segmentation`."""
        image_id, categories = self._form.image_id, self._form.category_ids or range(1, len(info.labels) + 1)
        boxes = np.concatenate([part.boxes[:, :2], part.boxes[:, 2:] - part.boxes[:, :2]], axis=1)
        found: list[dict[str, object]] = [
            {"image_id": image_id, "category_id": categories[label_id - 1], "bbox": box, "score": score}
            for box, label_id, score in zip(boxes, part.labels.tolist(), part.scores, strict=True)
        ]
        if masks is not None:
            for one, mask in zip(found, masks, strict=True):
                one["segmentation"] = mask
        return found
