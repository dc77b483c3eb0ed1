"""COCO evaluation of a predictor on a data set: average precision of boxes and masks. Called by the `evaluate` and
`train` commands; the figures are pycocotools' own.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from service.masks.rle import encode_rle
from service.structures import Detections, DetectOptions, Image, ModelInfo, Prediction, Query
from service.training.dataset import CocoDataset, Sample
from service.training.proposals import ProposalCache

AREAS = ("all", "small", "medium", "large")
"""COCO's: small is under 32 x 32 pixels of the original image, large over 96 x 96."""


class Predicts(Protocol):
    """What is evaluated: `service.inference.predictor.Predictor`, or a fake of it."""

    @property
    def info(self) -> ModelInfo:
        """Labels, thresholds, whether there are masks."""

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
    """Figures of one model on one data set; `masks` is None if either has none."""

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
        predictor: a loaded model whose labels are the data set's.
        dataset: what to compare with.
        max_detections: detections of one image that count (COCO's `maxDets`); the model's own limit if None.
        proposals: of the data set's pictures, for a network without an RPN; None lets it find its own.
        advance: called after every picture, for a progress bar.
    """
    limit = predictor.info.max_detections if max_detections is None else max_detections
    with_masks = predictor.info.has_masks and dataset.has_masks
    options = DetectOptions(score_thresh=0.0, max_detections=limit, with_masks=with_masks)
    results: list[dict[str, Any]] = []
    for sample in dataset.samples:
        found = predictor.predict([query_of(sample, options, proposals)])[0].detections
        results += coco_results(found, sample, dataset)
        advance()
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        truth.dataset = {"info": {}, **dataset.annotations}
        truth.createIndex()
        images = [sample.image_id for sample in dataset.samples]
        boxes, *masks = (
            _average_precision(truth, results, dataset, images, kind, limit)
            for kind in (("bbox", "segm") if with_masks else ("bbox",))
        )
    return Evaluation(boxes, masks[0] if masks else None, num_images=len(dataset), max_detections=limit)


def query_of(sample: Sample, options: DetectOptions, proposals: ProposalCache | None) -> Query:
    """The question for what is in a picture, with its proposals if there are some."""
    if proposals is not None:
        boxes = tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in proposals.of(sample).tolist())
        options = replace(options, proposals=boxes)
    return Query(Image(sample.read_pixels()), options)


def coco_results(detections: Detections, sample: Sample, dataset: CocoDataset) -> list[dict[str, Any]]:
    """One image's detections in COCO's results format."""
    widths_heights = detections.boxes[:, 2:] - detections.boxes[:, :2]
    boxes = np.concatenate([detections.boxes[:, :2], widths_heights], axis=1)
    rles: Sequence[object] = [None] * len(detections)
    if detections.masks is not None:
        rles = encode_rle(detections.masks, detections.boxes, sample.image_size)
    return [
        {
            "image_id": sample.image_id,
            "category_id": dataset.category_ids[label - 1],
            "bbox": box.tolist(),
            "score": float(score),
            **({} if rle is None else {"segmentation": rle}),
        }
        for box, label, score, rle in zip(boxes, detections.labels, detections.scores, rles, strict=True)
    ]


def _average_precision(
    truth: COCO,
    results: list[dict[str, Any]],
    dataset: CocoDataset,
    image_ids: list[int],
    kind: str,
    max_detections: int,
) -> AveragePrecision:
    if not results:
        zeros = dict.fromkeys(dataset.labels, 0.0)
        return AveragePrecision(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, zeros, zeros)
    coco_eval = COCOeval(truth, truth.loadRes([dict(one) for one in results]), kind)
    coco_eval.params.imgIds = image_ids
    coco_eval.params.catIds = list(dataset.category_ids)
    coco_eval.params.useCats = 1
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


def _mean(precision: NDArray[np.float64]) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else float("nan")
