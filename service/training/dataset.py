"""COCO-format data sets: read, checked, and handed out as samples. Knows files and annotations; knows nothing of
networks. Whatever ids, shapes and frames the file has, all other code sees a single form: images and labels numbered
from 1, boxes (x1, y1, x2, y2) in pixels of the upright picture, masks as run lengths.

Shapes: K objects of one image, H x W the image.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from service.errors import DatasetError, InvalidRequestError
from service.imaging.decode import decode_image
from service.structures import Float32Array, Int64Array, UInt8Array
from service.training.coco.annotations import Annotation, AnnotationReader, Masks
from service.training.coco.frames import Frame
from service.training.coco.pictures import PICTURE_LIMITS, PictureFacts, PictureFinder, look_at_all
from service.training.coco.report import DataReport
from service.training.coco.segmentations import Rle
from service.training.coco.tables import DeclaredImage, choose_labels, read_categories, read_document, read_images

StoredFrame = Literal["auto", "upright", "stored"]


@dataclass(frozen=True, slots=True, eq=False)
class ObjectMask:
    """One object's pixels, cropped to their bounding box.

    Attributes:
        bitmap: (h, w) uint8, 0 or 1.
        x, y: position of the bitmap's top left pixel in the image.
    """

    bitmap: UInt8Array
    x: int
    y: int


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One image with its objects.

    Attributes:
        image_id: from 1, in the order of the file.
        image_size: (height, width) in pixels of the upright picture.
        digest: of the picture's file.
        boxes: (K, 4) float32 (x1, y1, x2, y2).
        labels: (K,) int64, 1-based.
        areas: (K,) float64 in pixels; decides the size class in COCO's figures.
        segmentations: a mask for each object; None in a set without masks.
        crowds: regions that are not trained on; evaluation ignores detections in them.
    """

    image_id: int
    path: Path
    image_size: tuple[int, int]
    digest: str
    boxes: Float32Array
    labels: Int64Array
    areas: NDArray[np.float64]
    segmentations: tuple[Rle, ...] | None
    crowds: tuple[Annotation, ...] = ()

    def read_pixels(self) -> UInt8Array:
        """(H, W, 3) uint8 RGB, upright: decoded like in the server, so that both see the same pixels.

        Raises:
            DatasetError: the file changed after it was checked, and no longer decodes or has another size.
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
        return [_object_mask(one) for one in self.segmentations or ()]


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """A whole split.

    Attributes:
        path: the annotation file.
        labels: class names; `labels[i]` has the id i + 1.
        has_masks: whether every object has a segmentation.
        report: what was repaired and left out.
    """

    path: Path
    labels: tuple[str, ...]
    samples: tuple[Sample, ...]
    has_masks: bool
    report: DataReport

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that training and evaluation can see: labels, pictures, objects and their order."""
        digest = hashlib.blake2b(repr(self.labels).encode(), digest_size=16)
        for sample in self.samples:
            digest.update(f"{sample.digest}{sample.image_size}".encode())
            digest.update(sample.boxes.tobytes() + sample.labels.tobytes() + sample.areas.tobytes())
            for rle in sample.segmentations or ():
                digest.update(rle["counts"])
            digest.update(repr([(one.label, one.box, one.area) for one in sample.crowds]).encode())
        return digest.hexdigest()

    def counts(self) -> dict[str, int]:
        """Objects of each label."""
        counted = Counter(label for sample in self.samples for label in sample.labels.tolist())
        return {name: counted[place] for place, name in enumerate(self.labels, start=1)}

    def summary(self) -> str:
        """The numbers of pictures and objects, in one line."""
        counts = self.counts()
        each = ", ".join(f"{name} {count}" for name, count in counts.items())
        empty = sum(not len(sample.labels) for sample in self.samples)
        crowds = sum(len(sample.crowds) for sample in self.samples)
        return (
            f"{len(self)} pictures, {sum(counts.values())} objects ({each})"
            + (" with masks" if self.has_masks else "")
            + (f", {crowds} crowd regions" if crowds else "")
            + (f"; {empty} pictures without objects" if empty else "")
        )


def load_coco(
    path: Path,
    *,
    labels: Sequence[str] | None = None,
    leaves_out_others: bool = False,
    masks: Masks = "if_any",
    drop_bad: bool = False,
    frame: StoredFrame = "auto",
    start: Callable[[int], None] = lambda pictures: None,
    advance: Callable[[], None] = lambda: None,
) -> CocoDataset:
    """Read and check a COCO-format annotation file and its pictures.

    Args:
        path: the JSON; `PictureFinder` describes where its pictures may be.
        labels: the classes and their order; the file's own categories if None.
        leaves_out_others: skip annotations of categories that are not labels instead of rejecting them.
        masks: `required`: an object without one is bad; `if_any`: only if others have one; `none`: they are not read.
        drop_bad: leave bad annotations out instead of rejecting the data set.
        frame: what annotations of pictures that EXIF turns refer to, where no size tells: the picture as it is shown
            or as it is stored; `auto` is as in the set's other pictures, else as shown.
        start: called with the number of pictures before they are checked.
        advance: called after every picture.

    Raises:
        DatasetError: lists every problem, one per line.
    """
    report = DataReport(path)
    document = read_document(path)
    images = read_images(document, report)
    categories = read_categories(document, report)
    _refuse_if_stopped(report, drop_bad)
    names, label_of = choose_labels(categories, document, labels, report, leaves_out_others=leaves_out_others)
    _refuse_if_stopped(report, drop_bad)  # before every picture is checked, which takes a while
    files = _find_files(path, images, report)
    start(len(files))
    facts = dict(zip(files, look_at_all(list(files.values()), advance=advance), strict=True))
    frames = _choose_frames(images, facts, frame, report)
    reader = AnnotationReader(
        images=[image.key for image in images], frames=frames, label_of=label_of, masks=masks, report=report
    )
    found = reader.read(document["annotations"], drops_bad=drop_bad)
    if report.stopping or (report.bad and not drop_bad):
        raise DatasetError(report.refusal(drops_bad=drop_bad))
    samples = tuple(
        _sample(number, file, frames[key].upright_size, facts[key].digest, found[key], reader.has_masks)
        for number, (key, file) in enumerate(files.items(), start=1)
    )
    return CocoDataset(path, names, samples, reader.has_masks, report)


def _refuse_if_stopped(report: DataReport, drop_bad: bool) -> None:
    if report.stopping:
        raise DatasetError(report.refusal(drops_bad=drop_bad))


def _find_files(path: Path, images: Sequence[DeclaredImage], report: DataReport) -> dict[str, Path]:
    """The file of each image, by id."""
    finder = PictureFinder(path)
    files: dict[str, Path] = {}
    owners: dict[Path, str] = {}
    for image in images:
        found = finder.find(image.file_name)
        if found is None:
            places = ", ".join(map(str, finder.roots))
            report.stopping.append(f"image {image.key}: no file {image.file_name} in {places}")
            continue
        files[image.key], was_repaired = found
        if was_repaired:
            report.repaired["file names with another spelling or folder than here"] += 1
        owner = owners.setdefault(files[image.key].resolve(), image.key)
        if owner != image.key:
            report.stopping.append(f"image {image.key}: {image.file_name} is image {owner} already")
    return files


def _choose_frames(
    images: Sequence[DeclaredImage], facts: Mapping[str, PictureFacts], frame: StoredFrame, report: DataReport
) -> dict[str, Frame]:
    """The frame of each image's annotations. An image of unknown size has none, and is fatal for the data set."""
    frames: dict[str, Frame] = {}
    untold: list[str] = []
    told: Counter[bool] = Counter()
    for image in images:
        fact = facts.get(image.key, PictureFacts(problem="is missing"))
        if fact.problem is not None:
            if image.key in facts:
                report.stopping.append(f"image {image.key} ({image.file_name}): {fact.problem}")
            if image.size is not None:
                frames[image.key] = Frame(image.size)
            continue
        if image.size is None:
            report.repaired["sizes of images that are not said, read from the pictures"] += 1
        frames[image.key] = Frame(fact.upright_size)
        if image.size not in (None, fact.upright_size, fact.stored_size):
            report.stopping.append(f"image {image.key} ({image.file_name}): {_other_size(image.size, fact)}")
        elif fact.orientation != 1:
            if image.size is None or fact.stored_size == fact.upright_size:
                untold.append(image.key)
                continue
            is_stored = image.size == fact.stored_size
            told[is_stored] += 1
            if is_stored:
                frames[image.key] = Frame(fact.stored_size, fact.orientation)
    are_stored = frame == "stored" or (frame == "auto" and told[True] > 0 and not told[False])
    if are_stored:
        frames |= {key: Frame(facts[key].stored_size, facts[key].orientation) for key in untold}
    _tell_of_turned(told, untold, are_stored, report, was_asked=frame == "auto")
    return frames


def _other_size(declared: tuple[int, int] | None, fact: PictureFacts) -> str:
    assert declared is not None  # where nothing is declared, nothing differs
    height, width = fact.upright_size
    swapped = "; width and height look exchanged" if declared == (width, height) else ""
    return f"expected a picture of {declared[1]} x {declared[0]}, got {width} x {height}{swapped}"


def _tell_of_turned(
    told: Counter[bool], untold: Sequence[str], are_stored: bool, report: DataReport, *, was_asked: bool
) -> None:
    if told[True]:
        report.repaired["pictures that EXIF turns, annotated as they are stored, whose annotations were turned"] += (
            told[True]
        )
    if not untold:
        return
    taken = "as they are stored" if are_stored else "as they are shown"
    if are_stored:
        report.repaired["pictures that EXIF turns, taken as annotated as they are stored"] += len(untold)
    if was_asked:
        report.notes.append(
            f"EXIF turns {len(untold)} pictures whose sizes do not tell which way up they were annotated; taken as "
            f"annotated {taken} (--annotated upright or stored says so)"
        )


def _sample(
    image_id: int,
    path: Path,
    image_size: tuple[int, int],
    digest: str,
    annotations: Sequence[Annotation],
    has_masks: bool,
) -> Sample:
    objects = [one for one in annotations if not one.is_crowd]
    return Sample(
        image_id=image_id,
        path=path,
        image_size=image_size,
        digest=digest,
        boxes=np.array([one.box for one in objects], dtype=np.float32).reshape(-1, 4),
        labels=np.array([one.label for one in objects], dtype=np.int64),
        areas=np.array([one.area for one in objects], dtype=np.float64),
        segmentations=tuple(one.rle for one in objects if one.rle is not None) if has_masks else None,
        crowds=tuple(one for one in annotations if one.is_crowd),
    )


def _object_mask(rle: Rle) -> ObjectMask:
    x, y, w, h = (int(side) for side in coco_mask.toBbox(rle))
    return ObjectMask(np.ascontiguousarray(coco_mask.decode(rle)[y : y + h, x : x + w]), x, y)
