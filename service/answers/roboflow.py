"""Encodes detections as the `predictions` of Roboflow's inference server, as `inference_sdk` and
`supervision.Detections.from_inference` read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.answers.array import ArrayEncoder
from service.masks.polygons import outer_pixels, polygon_area
from service.masks.rle import encode_rle
from service.structures import Detections, Image, MaskFormat, ModelInfo, Roboflow, RoboflowMasks

_MASK_FORMATS: Mapping[RoboflowMasks, MaskFormat] = {"points": "polygons", "rle": "rle", "none": "none"}


class RoboflowEncoder(ArrayEncoder):
    """See the module."""

    def __init__(self, form: Roboflow) -> None:
        super().__init__(_MASK_FORMATS[form.masks])
        self.fewer = "max_detections or confidence"
        if form.masks == "points":
            self.smaller = "response_mask_format=rle"

    def objects(
        self, image: Image, part: Detections, masks: Sequence[Any] | None, info: ModelInfo
    ) -> list[dict[str, object]]:
        """`x` and `y` (of the centre), `width`, `height`, `confidence`, `class`, `class_id` (from 0), and the mask as
        `rle` or as the `points` of its largest part.
        """
        sizes = part.boxes[:, 2:] - part.boxes[:, :2]
        # In float64, so that clients get the corners back exactly.
        centres = part.boxes[:, :2].astype(float) + sizes.astype(float) / 2
        found: list[dict[str, object]] = [
            {
                "x": x,
                "y": y,
                "width": width,
                "height": height,
                "confidence": score,
                "class": info.labels[label_id - 1],
                "class_id": label_id - 1,
            }
            for (x, y), (width, height), score, label_id in zip(
                centres, sizes, part.scores, part.labels.tolist(), strict=True
            )
        ]
        for index, mask in enumerate(masks or ()):
            if self._masks == "rle":
                found[index]["rle"] = mask
            elif mask:
                corners = outer_pixels(max(mask, key=polygon_area))
                found[index]["points"] = [{"x": x, "y": y} for x, y in corners]
            else:
                # Clients drop the masks of all objects if one has none, so an empty mask is still a mask.
                found[index]["points"] = []
                found[index]["rle"] = _empty_mask(image, part[index : index + 1], info)
        return found


def _empty_mask(image: Image, one: Detections, info: ModelInfo) -> object:
    assert one.masks is not None
    return encode_rle(one.masks, one.boxes, image.size, style=info.mask_style)[0]
