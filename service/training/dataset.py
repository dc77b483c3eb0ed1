"""COCO-format data sets: read, check, and hand out as samples. Called by `loop.py` and `evaluation.py`.
Knows files and annotations; knows nothing of networks. Boxes become (x1, y1, x2, y2) in pixels of the stored image.

Shapes: K objects of one image, H x W the image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from service.errors import DatasetError, InvalidRequestError
from service.imaging.decode import ImageLimits, decode_image
from service.structures import Float32Array, Int64Array, UInt8Array

BOX_TOLERANCE_PIXELS = 1.0
"""A box may reach this far outside its image: rounding in common tools."""
MAX_REPORTED_PROBLEMS = 50
PICTURE_LIMITS = ImageLimits(max_image_pixels=500_000_000)
"""Wide: a data set is its owner's, not a stranger's."""


@dataclass(frozen=True, slots=True, eq=False)
class ObjectMask:
    """One object's pixels, cut to where they are.

    Attributes:
        bitmap: (h, w) uint8, 0 or 1.
        x, y: where the bitmap's top left pixel lies in the image.
    """

    bitmap: UInt8Array
    x: int
    y: int


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One image with its objects; crowd regions are left out.

    Attributes:
        image_size: (height, width) in pixels.
        boxes: (K, 4) float32 (x1, y1, x2, y2).
        labels: (K,) int64, 1-based.
        segmentations: COCO polygons or RLE for each object; None in a set without masks.
    """

    image_id: int
    path: Path
    image_size: tuple[int, int]
    boxes: Float32Array
    labels: Int64Array
    segmentations: tuple[object, ...] | None

    def read_pixels(self) -> UInt8Array:
        """(H, W, 3) uint8 RGB, upright: decoded as the server decodes it, so that both see the same pixels.

        Raises:
            DatasetError: the file does not decode, or has another size than the annotations say.
        """
        try:
            pixels = decode_image(self.path.read_bytes(), limits=PICTURE_LIMITS).pixels
        except (OSError, InvalidRequestError) as error:
            raise DatasetError(f"{self.path}: expected an image, got {error}") from error
        if pixels.shape[:2] != self.image_size:
            raise DatasetError(f"{self.path}: expected (height, width) {self.image_size}, got {pixels.shape[:2]}")
        return pixels

    def read_masks(self) -> list[ObjectMask]:
        """The K objects' pixels, decoded from their segmentations. Empty if the set has none."""
        return [_object_mask(one, self.image_size) for one in self.segmentations or ()]


@dataclass(frozen=True, slots=True, eq=False)
class CocoDataset:
    """A whole split.

    Attributes:
        annotations: the JSON as it was read, for COCO's own evaluation.
        labels: class names; `labels[i]` has the id i + 1.
        category_ids: the COCO category id of each label.
        has_masks: whether every object has a segmentation.
    """

    path: Path
    annotations: Mapping[str, Any]
    labels: tuple[str, ...]
    category_ids: tuple[int, ...]
    samples: tuple[Sample, ...]
    has_masks: bool

    def __len__(self) -> int:
        return len(self.samples)


def load_coco(
    path: Path, *, labels: Sequence[str] | None = None, needs_masks: bool = False, drop_bad: bool = False
) -> CocoDataset:
    """Read and check a COCO-format annotation file.

    Args:
        path: the JSON; pictures lie in `images/` beside it, or beside it.
        labels: the classes and their order; the file's own categories if None.
        needs_masks: whether an object without a segmentation is a problem.
        drop_bad: leave bad annotations out instead of refusing the set.

    Raises:
        DatasetError: with every problem, one a line: unreadable file, missing pictures, unknown categories or images,
            boxes outside their image or of no area, missing or broken segmentations.
    """
    raw = _read_json(path)
    if malformed := [*_malformed(raw)]:
        raise DatasetError(_report(path, malformed))
    categories = {category["id"]: str(category["name"]) for category in raw["categories"]}
    names = tuple(labels) if labels is not None else tuple(categories[key] for key in sorted(categories))
    problems = [
        f"category {name!r} is not among the model's labels: {', '.join(names)}"
        for name in categories.values()
        if name not in names
    ]
    problems += [
        f"label {name!r} of the model is not among the categories" for name in names if name not in categories.values()
    ]
    if problems:
        raise DatasetError(_report(path, problems))
    label_of = {key: names.index(name) + 1 for key, name in categories.items()}

    images = {image["id"]: image for image in raw["images"]}
    files = {key: _picture_path(path.parent, str(image["file_name"])) for key, image in images.items()}
    problems = [f"image {key}: no file {images[key]['file_name']}" for key, file in files.items() if file is None]
    good: dict[int, list[Mapping[str, Any]]] = {key: [] for key in images}
    bad: list[str] = []
    for annotation in raw["annotations"]:
        found = list(_annotation_problems(annotation, images, label_of, needs_masks))
        if found:
            bad.append(f"annotation {annotation.get('id', '?')}: {'; '.join(found)}")
        elif not annotation.get("iscrowd"):
            good[annotation["image_id"]].append(annotation)
    if problems or (bad and not drop_bad):
        raise DatasetError(_report(path, problems + bad))

    has_masks = all(one.get("segmentation") for own in good.values() for one in own)
    id_of = {name: key for key, name in categories.items()}
    return CocoDataset(
        path=path,
        annotations=raw,
        labels=names,
        category_ids=tuple(id_of[name] for name in names),
        samples=tuple(
            _sample(image, file, good[key], label_of, has_masks)
            for (key, image), file in zip(images.items(), files.values(), strict=True)
            if file is not None
        ),
        has_masks=has_masks,
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"expected a COCO annotation file at {path}, got {error.strerror}") from error
    except ValueError as error:
        raise DatasetError(f"{path}: expected JSON, got {error}") from error
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(raw, dict) or key not in raw]
    if missing:
        raise DatasetError(
            f"{path}: expected COCO's keys images, annotations, categories; missing: {', '.join(missing)}"
        )
    return raw  # type: ignore[no-any-return]  # json gives Any


def _malformed(raw: Mapping[str, Any]) -> Iterator[str]:
    """What is missing for the rest to be looked at at all."""
    if not raw["images"]:
        yield "expected at least one image, got none"
    for place, image in enumerate(raw["images"]):
        sides = (image.get("width"), image.get("height"))
        if "id" not in image or not isinstance(image.get("file_name"), str):
            yield f"images[{place}]: expected id and file_name, got {image}"
        elif not all(isinstance(side, int) and side > 0 for side in sides):
            yield f"image {image['id']}: expected width and height in pixels, got {sides[0]} and {sides[1]}"
    for place, category in enumerate(raw["categories"]):
        if "id" not in category or not isinstance(category.get("name"), str):
            yield f"categories[{place}]: expected id and name, got {category}"


def _picture_path(folder: Path, file_name: str) -> Path | None:
    return next((path for path in (folder / "images" / file_name, folder / file_name) if path.is_file()), None)


def _annotation_problems(
    annotation: Mapping[str, Any], images: Mapping[int, Any], label_of: Mapping[int, int], needs_masks: bool
) -> Iterator[str]:
    image = images.get(annotation.get("image_id", -1))
    if image is None:
        yield f"unknown image_id {annotation.get('image_id')}"
        return
    if annotation.get("category_id") not in label_of:
        yield f"unknown category_id {annotation.get('category_id')}"
    box: Any = annotation.get("bbox")
    is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)
    if not is_box or not all(map(math.isfinite, box)):
        yield f"expected bbox [x, y, width, height] of finite numbers, got {box}"
        return
    x, y, width, height = box
    if not (width > 0 and height > 0):
        yield f"expected a box with area, got {width} x {height}"
    slack = BOX_TOLERANCE_PIXELS
    if min(x, y) < -slack or x + width > image["width"] + slack or y + height > image["height"] + slack:
        yield f"box {box} reaches outside its image of {image['width']} x {image['height']}"
    if needs_masks and not annotation.get("iscrowd"):
        yield from _segmentation_problems(annotation.get("segmentation"), (image["height"], image["width"]))


def _segmentation_problems(segmentation: object, image_size: tuple[int, int]) -> Iterator[str]:
    if isinstance(segmentation, dict):
        if list(segmentation.get("size", ())) != list(image_size):
            yield f"expected an RLE of size {list(image_size)}, got {segmentation.get('size')}"
        else:
            yield from _rle_problems(segmentation, image_size)
    elif not isinstance(segmentation, list) or not segmentation:
        yield "expected a segmentation (polygons or RLE), got none"
    elif any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
        yield "expected polygons of at least 3 points as [x, y, x, y, …]"


def _rle_problems(rle: Mapping[str, Any], image_size: tuple[int, int]) -> Iterator[str]:
    try:
        mask = _object_mask(rle, image_size)
    except (KeyError, TypeError, ValueError) as error:
        yield f"expected COCO's run lengths in 'counts', got some that do not decode: {error}"
        return
    if mask.bitmap.size == 0:
        yield "expected an RLE with at least one pixel, got an empty one"


def _report(path: Path, problems: Sequence[str]) -> str:
    shown = [f"  {problem}" for problem in problems[:MAX_REPORTED_PROBLEMS]]
    if len(problems) > len(shown):
        shown.append(f"  … and {len(problems) - len(shown)} more")
    return "\n".join([f"{path}: {len(problems)} problem(s) in the data set", *shown])


def _sample(
    image: Mapping[str, Any],
    path: Path,
    annotations: Sequence[Mapping[str, Any]],
    label_of: Mapping[int, int],
    has_masks: bool,
) -> Sample:
    height, width = int(image["height"]), int(image["width"])
    boxes = np.array([one["bbox"] for one in annotations], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], dtype=np.float32))
    return Sample(
        image_id=int(image["id"]),
        path=path,
        image_size=(height, width),
        boxes=boxes,
        labels=np.array([label_of[one["category_id"]] for one in annotations], dtype=np.int64),
        segmentations=tuple(one["segmentation"] for one in annotations) if has_masks else None,
    )


def _object_mask(segmentation: Any, image_size: tuple[int, int]) -> ObjectMask:
    height, width = image_size
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    x, y, w, h = (int(side) for side in coco_mask.toBbox(rle))
    return ObjectMask(np.ascontiguousarray(coco_mask.decode(rle)[y : y + h, x : x + w]), x, y)
