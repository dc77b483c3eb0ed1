"""Encodes detections as the shapes that CVAT takes from its functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from service.answers.array import ArrayEncoder
from service.structures import Cvat, Detections, Image, ModelInfo


class CvatEncoder(ArrayEncoder):
    """See the module."""

    smaller = "the function for boxes"
    fewer = "a higher threshold"

    def __init__(self, form: Cvat) -> None:
        super().__init__("outlines and bitmap" if form.with_masks else "none")

    def objects(
        self, image: Image, part: Detections, masks: Sequence[Any] | None, info: ModelInfo
    ) -> list[dict[str, object]]:
        """`confidence`, `label`, `type` and `points`: the corners of the box, or the outline of the mask."""
        kind = "rectangle" if masks is None else "mask"
        # CVAT takes a single outline, for people who want polygons rather than masks.
        points = part.boxes if masks is None else [outlines[0] if outlines else [] for outlines, _ in masks]
        return [
            {"confidence": score, "label": info.labels[label_id - 1], "type": kind, "points": corners}
            for score, label_id, corners in zip(part.scores, part.labels.tolist(), points, strict=True)
        ]

    def write(self, objects: Sequence[Mapping[str, object]], masks: Sequence[Any] | None) -> Iterator[bytes]:
        """Bitmaps are written as text directly: as numbers, each pixel would take eight bytes. Empty ones are left
        out.
        """
        if masks is None:
            yield from super().write(objects, masks)
            return
        comma = b""
        for one, (outlines, bitmap) in zip(objects, masks, strict=True):
            if outlines:
                yield b'%s%s,"mask":[' % (comma, orjson.dumps(one, option=orjson.OPT_SERIALIZE_NUMPY)[:-1])
                yield from bitmap.write()
                last = bitmap.x + bitmap.width - 1, bitmap.y + bitmap.height - 1
                yield b"%d,%d,%d,%d]}" % (bitmap.x, bitmap.y, *last)
                comma = b","
