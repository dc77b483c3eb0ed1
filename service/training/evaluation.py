"""COCO evaluation of a predictor on a data set: average precision of boxes and masks. The figures are those of
pycocotools, computed on our clean form of the data.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from service.errors import DatasetError
from service.masks.rle import encode_rle
from service.structures import Detections, DetectOptions, Image, MaskStyle, ModelInfo, Prediction, Query
from service.training.coco.segmentations import Rle
from service.training.dataset import CocoDataset, Sample
from service.training.matching import CompiledCOCOeval
from service.training.proposals import ProposalCache

AREAS = ("all", "small", "medium", "large")
"""COCO's: small is under 32 x 32 pixels of the original image, large over 96 x 96."""


class Predicts(Protocol):
    """The interface of what is evaluated: `service.inference.predictor.Predictor`, or a fake."""

    @property
    def info(self) -> ModelInfo:
        """Labels, thresholds, and whether there are masks."""

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        """Answer a batch."""


@dataclass(frozen=True, slots=True)
class AveragePrecision:
    """COCO's figures, 0 to 1; NaN where the data set has no such object.

    Attributes:
        ap: mean over IoU 0.50:0.05:0.95.
        ap50, ap75: at one IoU.
        ap_small, ap_medium, ap_large: `ap` by area of the object.
        ap50_by_label: at IoU 0.5 for each class.
        ap_by_label: `ap` for each class.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ap_by_label: Mapping[str, float]
    ap50_by_label: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of one model on one data set; `masks` is None if the model or the data set has no masks."""

    boxes: AveragePrecision
    masks: AveragePrecision | None
    num_images: int
    max_detections: int

    def rows(self) -> Iterator[tuple[str, AveragePrecision]]:
        """The figures as a table: (`boxes` or `masks`, figures)."""
        yield "boxes", self.boxes
        if self.masks is not None:
            yield "masks", self.masks


def evaluate(
    predictor: Predicts,
    dataset: CocoDataset,
    *,
    max_detections: int | None = None,
    proposals: ProposalCache | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run every picture alone through the predictor and compare with the annotations.

    Args:
        predictor: a loaded model that knows the data set's labels; its detections of other labels do not count.
        dataset: what to compare with.
        max_detections: detections of one image that count (COCO's `maxDets`); the model's own limit if None.
        proposals: of the data set's pictures, for a network without an RPN; None lets it find its own.
        advance: called after every picture, for a progress bar.

    Raises:
        DatasetError: the model does not know one of the labels.
    """
    limit = predictor.info.max_detections if max_detections is None else max_detections
    with_masks = predictor.info.has_masks and dataset.has_masks
    label_of = _labels_in(predictor.info, dataset)
    asked = None if len(label_of) == len(predictor.info.labels) else frozenset(label_of)
    options = DetectOptions(score_thresh=0.0, max_detections=limit, label_ids=asked, with_masks=with_masks)
    results: list[dict[str, Any]] = []
    for sample in dataset.samples:
        found = predictor.predict([query_of(sample, options, proposals)])[0].detections
        results += coco_results(found, sample, label_of, mask_style=predictor.info.mask_style)
        advance()
    kinds = ("bbox", "segm") if with_masks else ("bbox",)
    boxes, *masks = (_average_precision(results, dataset, kind, limit) for kind in kinds)
    return Evaluation(boxes, masks[0] if masks else None, num_images=len(dataset), max_detections=limit)


def _labels_in(info: ModelInfo, dataset: CocoDataset) -> dict[int, int]:
    """The data set's label for each label of the model that it contains."""
    if unknown := [name for name in dataset.labels if name not in info.labels]:
        raise DatasetError(f"{dataset.path}: {info.key} does not know the labels {', '.join(unknown)}")
    return {info.labels.index(name) + 1: place for place, name in enumerate(dataset.labels, start=1)}


def query_of(sample: Sample, options: DetectOptions, proposals: ProposalCache | None) -> Query:
    """The query for a picture, with its proposals if there are any."""
    if proposals is not None:
        boxes = tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in proposals.of(sample).tolist())
        options = replace(options, proposals=boxes)
    return Query(Image(sample.read_pixels()), options)


def coco_results(
    detections: Detections, sample: Sample, label_of: Mapping[int, int], *, mask_style: MaskStyle = "torchvision"
) -> list[dict[str, Any]]:
    """One image's detections in COCO's results format.

    Args:
        label_of: the data set's label of each label of the model.
        mask_style: the model's.
    """
    widths_heights = detections.boxes[:, 2:] - detections.boxes[:, :2]
    boxes = np.concatenate([detections.boxes[:, :2], widths_heights], axis=1)
    rles: Sequence[object] = [None] * len(detections)
    if detections.masks is not None:
        rles = encode_rle(detections.masks, detections.boxes, sample.image_size, style=mask_style)
    return [
        {
            "image_id": sample.image_id,
            "category_id": label_of[int(label)],
            "bbox": box.tolist(),
            "score": float(score),
            **({} if rle is None else {"segmentation": rle}),
        }
        for box, label, score, rle in zip(boxes, detections.labels, detections.scores, rles, strict=True)
    ]


def _average_precision(
    results: Sequence[Mapping[str, Any]], dataset: CocoDataset, kind: str, max_detections: int
) -> AveragePrecision:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco_eval = CompiledCOCOeval(
            _indexed(dataset, list(_truth(dataset))), _indexed(dataset, list(_found(results, kind))), kind
        )
        coco_eval.params.maxDets = [max_detections]
        coco_eval.evaluate()
        coco_eval.accumulate()
    # IoU thresholds x recalls x classes x areas x maxDets; -1 where there is no such object. COCOeval's own summary
    # insists on maxDets = 100, so the same means are taken here.
    precision = coco_eval.eval["precision"][..., 0]
    by_area = dict(zip(AREAS, np.moveaxis(precision, 3, 0), strict=True))
    everything = by_area["all"]
    return AveragePrecision(
        ap=_mean(everything),
        ap50=_mean(everything[0]),
        ap75=_mean(everything[5]),
        ap_small=_mean(by_area["small"]),
        ap_medium=_mean(by_area["medium"]),
        ap_large=_mean(by_area["large"]),
        ap_by_label={name: _mean(everything[..., index]) for index, name in enumerate(dataset.labels)},
        ap50_by_label={name: _mean(everything[0, :, index]) for index, name in enumerate(dataset.labels)},
    )


def _indexed(dataset: CocoDataset, annotations: list[dict[str, Any]]) -> COCO:
    """The annotation index for pycocotools. Ids start at 1: pycocotools treats annotation 0 as no annotation."""
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": sample.image_id, "height": sample.image_size[0], "width": sample.image_size[1]}
            for sample in dataset.samples
        ],
        "categories": [{"id": place, "name": name} for place, name in enumerate(dataset.labels, start=1)],
        "annotations": [{"id": number, **one} for number, one in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco


def _truth(dataset: CocoDataset) -> Iterator[dict[str, Any]]:
    for sample in dataset.samples:
        rles = sample.segmentations or (None,) * len(sample.labels)
        for box, label, area, rle in zip(sample.boxes.tolist(), sample.labels, sample.areas, rles, strict=True):
            yield _annotation(sample.image_id, int(label), box, float(area), rle, is_crowd=False)
        for crowd in sample.crowds:
            yield _annotation(sample.image_id, crowd.label, crowd.box, crowd.area, crowd.rle, is_crowd=True)


def _annotation(
    image_id: int, label: int, box: Sequence[float], area: float, rle: Rle | None, *, is_crowd: bool
) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    return {
        "image_id": image_id,
        "category_id": label,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": area,
        "iscrowd": int(is_crowd),
        **({} if rle is None else {"segmentation": rle}),
    }


def _found(results: Sequence[Mapping[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """Detections with the area that COCO's figures by size sort them by: the mask's for masks, else the box's.

    `COCO.loadRes` takes the box's for both where a detection has a box.
    """
    for one in results:
        area = one["bbox"][2] * one["bbox"][3] if kind == "bbox" else float(coco_mask.area(one["segmentation"]))
        yield {**one, "area": area, "iscrowd": 0}


def _mean(precision: NDArray[np.float64]) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else float("nan")
