"""Encodes detections as the JSON array that `/v1/detect` answers; `api/schemas.py` describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from service.answers.array import ArrayEncoder
from service.structures import Detections, Image, Json, MaskFormat, ModelInfo

# What to ask for instead of an answer that would be too large; without masks if nothing else.
_SMALLER: Mapping[MaskFormat, str] = {"png": "masks=crop or masks=rle", "polygons": "masks=rle or masks=crop"}


class JsonEncoder(ArrayEncoder):
    """See the module."""

    def __init__(self, form: Json) -> None:
        super().__init__(form.masks)
        self.smaller = _SMALLER.get(form.masks, self.smaller)

    def objects(
        self, image: Image, part: Detections, masks: Sequence[Any] | None, info: ModelInfo
    ) -> list[dict[str, object]]:
        """`box`, `label`, `label_id`, `score`, with masks `mask`, and what else was asked for, by name."""
        found: list[dict[str, object]] = [
            {"box": box, "label": info.labels[label_id - 1], "label_id": label_id, "score": score}
            for box, label_id, score in zip(part.boxes, part.labels.tolist(), part.scores, strict=True)
        ]
        if masks is not None:
            for detection, mask in zip(found, masks, strict=True):
                detection["mask"] = mask
        for name, values in part.extras.items():
            for detection, value in zip(found, np.ascontiguousarray(values), strict=True):
                detection[name] = value
        return found
