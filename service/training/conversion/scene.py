"""The common result of all converters, and how to write it as COCO files and a folder of pictures."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.errors import DatasetError
from service.training.coco.frames import Frame
from service.training.coco.pictures import PictureFacts, look_at_all
from service.training.coco.segmentations import BadSegmentation, area_of, read_segmentation

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class Shape:
    """One object.

    Attributes:
        label: its category's name.
        box: (x1, y1, x2, y2) in pixels.
        segmentation: as in COCO, polygons or an RLE; None if there is only a box.
        where: the file and line it comes from, for messages.
        area: in pixels, if the source gives it; otherwise the area of the mask, or of the box, is written.
    """

    label: str
    box: tuple[float, float, float, float]
    segmentation: Any = None
    where: str = ""
    is_crowd: bool = False
    area: float | None = None


@dataclass(slots=True, eq=False)
class Scene:
    """A picture with its objects.

    Attributes:
        split: `train`, `val` or `test`; empty if the source does not say.
        name: identifies the picture in its data set.
    """

    picture: Path
    split: str
    name: str
    shapes: list[Shape] = field(default_factory=list)


def polygon_shape(label: str, points: Sequence[float], where: str) -> Shape:
    """The object within a polygon [x, y, …].

    Raises:
        DatasetError: fewer than three points.
    """
    if len(points) < 6 or len(points) % 2:
        raise DatasetError(f"{where}: expected a polygon of at least 3 points, got {len(points)} numbers")
    xs, ys = points[::2], points[1::2]
    return Shape(label, (min(xs), min(ys), max(xs), max(ys)), [list(points)], where)


def plain_rle(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Pycocotools' RLE in a form that JSON can hold."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def pictures_in(folder: Path) -> list[Path]:
    """All pictures below a folder, by their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())


def split_up(scenes: Iterable[Scene], *, val_share: float) -> None:
    """Assign a split to pictures without one, by a hash of the name, so that it is stable when pictures are added."""
    for scene in scenes:
        if not scene.split:
            number = int.from_bytes(hashlib.sha256(scene.name.encode()).digest()[:4], "big")
            scene.split = "val" if number < val_share * 2**32 else "train"


def write_scenes(scenes: Sequence[Scene], labels: Sequence[str], target: Path, *, links: bool) -> Mapping[str, int]:
    """Write `train.json` etc., and `images/`.

    Args:
        labels: the categories, in the order of their ids.
        target: a folder that does not exist yet, or is empty.
        links: link to the pictures instead of copying them.

    Returns:
        The number of pictures in each split.

    Raises:
        DatasetError: a picture cannot be read, two in a split have the same name, or the folder cannot be written.
    """
    facts = look_at_all([scene.picture for scene in scenes])
    if broken := [f"{one.picture}: {fact.problem}" for one, fact in zip(scenes, facts, strict=True) if fact.problem]:
        raise DatasetError("\n  ".join([f"{len(broken)} picture(s) cannot be read", *broken[:50]]))
    documents: dict[str, dict[str, Any]] = {}
    try:
        if target.exists() and any(target.iterdir()):
            raise DatasetError(f"{target} is not empty; nothing is overwritten")
        for scene, fact in zip(scenes, facts, strict=True):
            document = documents.setdefault(scene.split, _empty(labels))
            name = f"{scene.split}/{scene.name}"
            _place(scene.picture, target / "images" / name, links=links)
            _add(document, scene, fact, name, labels)
        for split, document in documents.items():
            (target / f"{split}.json").write_text(json.dumps(document), encoding="utf-8")
    except OSError as error:
        raise DatasetError(f"{target}: cannot be written: {error.strerror}") from error
    return {split: len(document["images"]) for split, document in documents.items()}


def _empty(labels: Sequence[str]) -> dict[str, Any]:
    categories = [{"id": place, "name": name} for place, name in enumerate(labels, start=1)]
    return {"images": [], "annotations": [], "categories": categories}


def _place(source: Path, target: Path, *, links: bool) -> None:
    if target.exists():
        raise DatasetError(f"{source}: another picture of this split is called {target.name} too")
    target.parent.mkdir(parents=True, exist_ok=True)
    if links:
        os.symlink(source.resolve(), target)
    else:
        shutil.copyfile(source, target)


def _add(document: dict[str, Any], scene: Scene, fact: PictureFacts, name: str, labels: Sequence[str]) -> None:
    height, width = fact.upright_size
    image_id = len(document["images"]) + 1
    document["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
    for shape in scene.shapes:
        x1, y1, x2, y2 = shape.box
        document["annotations"].append(
            {
                "id": len(document["annotations"]) + 1,
                "image_id": image_id,
                "category_id": labels.index(shape.label) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": _area(shape, fact),
                "iscrowd": int(shape.is_crowd),
                **({} if shape.segmentation is None else {"segmentation": shape.segmentation}),
            }
        )


def _area(shape: Shape, fact: PictureFacts) -> float:
    if shape.area is not None:
        return shape.area
    x1, y1, x2, y2 = shape.box
    try:
        return area_of(read_segmentation(shape.segmentation, Frame(fact.upright_size))[0])
    except BadSegmentation:  # none, or one that `roiserve data check` will name
        return (x2 - x1) * (y2 - y1)
