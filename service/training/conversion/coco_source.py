"""Read COCO files in other tools' folder layouts, with our own reader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from service.training.conversion.scene import Scene, Shape, plain_rle
from service.training.conversion.sources import coco_files
from service.training.dataset import CocoDataset, Sample, load_coco


def read_coco_source(source: Path) -> tuple[list[Scene], list[str]]:
    """The pictures with their objects, and the categories.

    Raises:
        DatasetError: see `load_coco`.
    """
    sets = {split: load_coco(path) for split, path in coco_files(source).items()}
    labels = list(dict.fromkeys(name for dataset in sets.values() for name in dataset.labels))
    scenes = [
        Scene(sample.path, split, sample.path.name, list(_shapes(sample, dataset)))
        for split, dataset in sets.items()
        for sample in dataset.samples
    ]
    return scenes, labels


def _shapes(sample: Sample, dataset: CocoDataset) -> Iterator[Shape]:
    rles = sample.segmentations or (None,) * len(sample.labels)
    columns = zip(sample.boxes.tolist(), sample.labels.tolist(), sample.areas.tolist(), rles, strict=True)
    for (x1, y1, x2, y2), label, area, rle in columns:
        segmentation = None if rle is None else plain_rle(rle)
        yield Shape(dataset.labels[label - 1], (x1, y1, x2, y2), segmentation, area=area)
    for one in sample.crowds:
        segmentation = None if one.rle is None else plain_rle(one.rle)
        yield Shape(dataset.labels[one.label - 1], one.box, segmentation, is_crowd=True)
