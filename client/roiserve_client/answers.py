"""What the server answers, as data classes. They are lenient: a newer server may send further members, which are in
`document`.

Shapes: D detections, H x W the image's height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from roiserve_client.masks import BoolArray, Mask


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """The image as the boxes see it: in pixels, after EXIF orientation."""

    width: int
    height: int
    orientation_applied: bool


@dataclass(frozen=True, slots=True)
class Detection:
    """One object.

    Attributes:
        box: x1, y1, x2, y2 in pixels of the image.
        label_id: counts from 1.
        score: 0 to 1.
        mask: None without masks.
        class_scores: the probability of every class, from the background (0) on; None unless `extras` asked for it.
    """

    box: tuple[float, float, float, float]
    label: str
    label_id: int
    score: float
    mask: Mask | None = None
    class_scores: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model found in one image.

    Attributes:
        request_id: by which the server's log knows the request.
        roi_op: the RoI operator that the model ran with.
        detections: by falling score.
        timings_ms: how long the stages took.
        batch_size: how many images shared the batch.
        document: the whole answer as it came.
    """

    request_id: str
    model: str
    version: int
    roi_op: str
    image: ImageInfo
    detections: tuple[Detection, ...]
    timings_ms: Mapping[str, float]
    batch_size: int
    document: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read an answer of `/v1/detect`, or one image's of `/v1/detect/batch`.

        Raises:
            KeyError, TypeError, ValueError: something else.
        """
        image = document["image"]
        size = image["height"], image["width"]
        return cls(
            request_id=document.get("request_id", ""),
            model=document["model"],
            version=document["version"],
            roi_op=document["roi_op"],
            image=ImageInfo(image["width"], image["height"], image["orientation_applied"]),
            detections=tuple(_detection(one, size) for one in document["detections"]),
            timings_ms=document["timings_ms"],
            batch_size=document["batch_size"],
            document=document,
        )

    @property
    def boxes(self) -> npt.NDArray[np.float32]:
        """(D, 4) float32: x1, y1, x2, y2 in pixels."""
        return np.array([one.box for one in self.detections], np.float32).reshape(-1, 4)

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """(D,) float32."""
        return np.array([one.score for one in self.detections], np.float32)

    @property
    def labels(self) -> list[str]:
        """D names of classes."""
        return [one.label for one in self.detections]

    @property
    def label_ids(self) -> npt.NDArray[np.int64]:
        """(D,) int64, from 1."""
        return np.array([one.label_id for one in self.detections], np.int64)

    @property
    def masks(self) -> BoolArray:
        """(D, H, W) bool, decoded anew at every access: of many objects in a large image this takes gigabytes, and
        `detection.mask.to_numpy()`, one by one, does not.

        Raises:
            ValueError: the answer has no masks.
        """
        masks = [one.mask for one in self.detections if one.mask is not None]
        if len(masks) < len(self.detections):
            raise ValueError(f"the answer of {self.model}@{self.version} has no masks")
        shape = len(masks), self.image.height, self.image.width
        return np.stack([one.to_numpy() for one in masks]) if masks else np.zeros(shape, np.bool_)

    def to_coco(self, image_id: int, category_ids: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
        """The detections as COCO's results, which `pycocotools` evaluates.

        Args:
            category_ids: by label; the server's own ids if None.

        Raises:
            ValueError: a label is not among the categories, or the masks are PNG, which COCO does not know.
        """
        return [_coco_result(one, image_id, category_ids) for one in self.detections]


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model.

    Attributes:
        is_default: whether requests that name no model go to it.
        labels: the label at index i has the id i + 1.
        document: the whole description as it came.
    """

    name: str
    version: int
    is_default: bool
    architecture: str
    roi_op: str
    labels: tuple[str, ...]
    score_thresh: float
    max_detections: int
    has_masks: bool
    engine: str
    precision: str
    device: str
    document: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read a model of `/v1/models`."""
        renamed = {"is_default": document["default"], "labels": tuple(document["labels"]), "document": document}
        same = {name: document[name] for name in cls.__dataclass_fields__ if name not in renamed}
        return cls(**same, **renamed)


def _detection(document: Mapping[str, Any], image_size: tuple[int, int]) -> Detection:
    x1, y1, x2, y2 = document["box"]
    data = document.get("mask")
    mask = None if data is None else Mask(data, image_size)
    scores = document.get("class_scores")
    return Detection(
        box=(x1, y1, x2, y2),
        label=document["label"],
        label_id=document["label_id"],
        score=document["score"],
        mask=mask,
        class_scores=None if scores is None else tuple(scores),
    )


def _coco_result(found: Detection, image_id: int, category_ids: Mapping[str, int] | None) -> dict[str, Any]:
    if category_ids is not None and found.label not in category_ids:
        raise ValueError(f"no category is called {found.label!r}; there are: {', '.join(category_ids)}")
    x1, y1, x2, y2 = found.box
    result: dict[str, Any] = {
        "image_id": image_id,
        "category_id": found.label_id if category_ids is None else category_ids[found.label],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "score": found.score,
    }
    if found.mask is not None:
        if found.mask.form not in ("rle", "polygons"):
            raise ValueError(f"COCO's masks are run lengths or polygons, not {found.mask.form}; ask for masks='rle'")
        result["segmentation"] = found.mask.data
    return result
