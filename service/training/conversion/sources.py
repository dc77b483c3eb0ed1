"""Read data sets in other tools' layouts: detect a folder's layout, and read its pictures with their objects."""

from __future__ import annotations

import json
import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml
from pycocotools import mask as coco_mask

from service.errors import DatasetError
from service.training.coco.pictures import look_at
from service.training.coco.tables import KEYS
from service.training.conversion.scene import (
    PICTURE_SUFFIXES,
    Scene,
    Shape,
    pictures_in,
    plain_rle,
    polygon_shape,
)
from service.training.conversion.xml_reader import number_in, read_xml

Layout = Literal["coco", "yolo", "voc", "labelme", "cvat"]
Read = tuple[list[Scene], list[str]]
# Beyond this many, the nearest files decide what a folder is.
_MOST_FILES = 2000
_SPLITS = {"train": "train", "valid": "val", "val": "val", "validation": "val", "test": "test"}


def layout_of(source: Path) -> Layout:
    """The layout of a folder or file.

    Raises:
        DatasetError: not a layout that we read.
    """
    if not source.exists():
        raise DatasetError(f"{source}: no such file or folder")
    files = [source] if source.is_file() else _first_files(source)
    if any(path.suffix == ".json" and _is_coco(path) for path in files):
        return "coco"
    if any(path.suffix == ".json" and "shapes" in _json(path) for path in files):
        return "labelme"
    if any(path.suffix in (".yaml", ".yml") and "names" in _yaml(path) for path in files):
        return "yolo"
    for path in (one for one in files if one.suffix == ".xml"):
        root = read_xml(path)
        if root.tag == "annotations":
            return "cvat"
        if root.tag == "annotation":
            return "voc"
    if any(path.name == "classes.txt" for path in files):
        return "yolo"
    raise DatasetError(f"{source}: expected a data set in one of {', '.join(get_args(Layout))}, got none of them")


def read_source(source: Path, layout: Layout) -> Read:
    """The pictures with their objects, and the categories in the order of their ids.

    Raises:
        DatasetError: a file violates the layout; the message names file and line.
    """
    readers: dict[str, Callable[[Path], Read]] = {
        "yolo": _read_yolo,
        "voc": _read_voc,
        "labelme": _read_labelme,
        "cvat": _read_cvat,
    }
    scenes, labels = readers[layout](source)
    if not scenes:
        raise DatasetError(f"{source}: expected pictures with {layout} annotations, got none")
    return scenes, labels


def coco_files(source: Path) -> dict[str, Path]:
    """COCO's annotation files by their splits: ours, Roboflow's (`train/_annotations.coco.json`) or COCO's own
    (`annotations/instances_train2017.json`).

    Raises:
        DatasetError: none, or two of one split.
    """
    found: dict[str, Path] = {}
    files = [source] if source.is_file() else [path for path in _first_files(source) if path.suffix == ".json"]
    for path in files:
        if not _is_coco(path):
            continue
        words = path.parent.name if path.name == "_annotations.coco.json" else path.stem
        split = next((ours for theirs, ours in _SPLITS.items() if theirs in words.lower()), "train")
        if split in found:
            raise DatasetError(f"{source}: {found[split]} and {path} are both of the split {split}")
        found[split] = path
    if not found:
        raise DatasetError(f"{source}: expected COCO annotation files, got none")
    return found


def _first_files(folder: Path) -> list[Path]:
    """Non-picture files at most three folders deep, a few from each folder; the nearest come first."""
    found: list[Path] = []
    for path, folders, files in os.walk(folder):
        if len(Path(path).relative_to(folder).parts) >= 3:
            folders.clear()
        others = sorted(name for name in files if Path(name).suffix.lower() not in PICTURE_SUFFIXES)
        found += [Path(path, name) for name in others[:_MOST_FILES]]
        if len(found) > _MOST_FILES:
            break
    return sorted(found, key=lambda path: (len(path.parts), str(path)))[:_MOST_FILES]


def _json(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: expected JSON, got {error}") from error
    return raw if isinstance(raw, dict) else {}


def _is_coco(path: Path) -> bool:
    return all(key in _json(path) for key in KEYS)


def _yaml(path: Path) -> Mapping[str, Any]:
    try:
        raw = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DatasetError(f"{path}: expected YAML, got {str(error).splitlines()[0]}") from error
    return raw if isinstance(raw, dict) else {}


def _read_yolo(source: Path) -> Read:
    """`data.yaml` names the classes and the splits' folders; `labels/x.txt` has one line per object: class, then the
    box's centre and size or a polygon, in fractions of the picture.
    """
    config = next(
        (path for path in _first_files(source) if path.suffix in (".yaml", ".yml") and "names" in _yaml(path)), None
    )
    root = source if config is None else config.parent
    names = _yolo_names(source, config)
    scenes = [
        Scene(picture, split, picture.name, list(_yolo_shapes(picture, names)))
        for split, pictures in _yolo_splits(root, config).items()
        for picture in pictures
    ]
    return scenes, names


def _yolo_names(source: Path, config: Path | None) -> list[str]:
    if config is None:
        listed = next(iter(sorted(source.rglob("classes.txt"))), None)
        if listed is None:
            raise DatasetError(f"{source}: expected data.yaml or classes.txt with the classes' names, got neither")
        return [line.strip() for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    names = _yaml(config)["names"]
    if isinstance(names, dict):
        try:
            by_number = {int(key): str(name) for key, name in names.items()}
        except ValueError:
            raise DatasetError(f"{config}: expected names by number, got {list(names)[:5]}") from None
        return [by_number.get(number, f"class {number}") for number in range(max(by_number, default=-1) + 1)]
    if isinstance(names, list) and names:
        return [str(name) for name in names]
    raise DatasetError(f"{config}: expected a list of names, got {names!r}")


def _yolo_splits(root: Path, config: Path | None) -> dict[str, list[Path]]:
    document = {} if config is None else _yaml(config)
    base = root / str(document.get("path") or ".")
    splits: dict[str, list[Path]] = {}
    for key in ("train", "val", "valid", "test"):
        entries = document.get(key)
        for entry in [entries] if isinstance(entries, str) else entries or []:
            place = _yolo_place(base, root, str(entry))
            if place is not None:
                splits.setdefault(_SPLITS[key], []).extend(_yolo_pictures(place))
            elif key == "train":
                raise DatasetError(f"{config}: no folder {entry} for {key}")
    return splits or {"": pictures_in(root)}


def _yolo_place(base: Path, root: Path, entry: str) -> Path | None:
    """The folder or list that an entry refers to: Roboflow writes `../train/images` for a folder beside `data.yaml`."""
    tail = "/".join(part for part in entry.replace("\\", "/").split("/") if part not in ("", ".", ".."))
    return next((one for one in (base / entry, root / entry, root / tail) if one.exists()), None)


def _yolo_pictures(place: Path) -> list[Path]:
    if place.is_dir():
        return pictures_in(place)
    lines = [line.strip() for line in place.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    pictures = [found for line in lines if (found := _yolo_place(place.parent, place.parent, line)) is not None]
    if len(pictures) != len(lines):
        raise DatasetError(f"{place}: {len(lines) - len(pictures)} of its {len(lines)} pictures are not there")
    return pictures


def _yolo_shapes(picture: Path, names: Sequence[str]) -> Iterator[Shape]:
    parts = list(picture.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    path = next((one for one in (Path(*parts).with_suffix(".txt"), picture.with_suffix(".txt")) if one.is_file()), None)
    if path is None:
        return  # a picture without objects
    height, width = look_at(picture).upright_size
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            numbers = [float(word) for word in line.split()]
        except ValueError:
            raise DatasetError(f"{where}: expected a class and numbers, got {line[:80]!r}") from None
        if not numbers:
            continue
        kind, values = numbers[0], numbers[1:]
        if not kind.is_integer() or not 0 <= kind < len(names):
            raise DatasetError(f"{where}: expected a class from 0 to {len(names) - 1}, got {line.split()[0]}")
        if not all(-0.01 <= value <= 1.01 for value in values):
            raise DatasetError(f"{where}: expected fractions of the picture, 0 to 1, got {line[:80]!r}")
        label = names[int(kind)]
        if len(values) in (4, 5):  # a fifth number is a score
            x, y, w, h = values[0] * width, values[1] * height, values[2] * width, values[3] * height
            yield Shape(label, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), where=where)
        else:
            points = [value * (height if place % 2 else width) for place, value in enumerate(values)]
            yield polygon_shape(label, points, where)


def _read_voc(source: Path) -> Read:
    """One `Annotations/x.xml` per picture, and perhaps `ImageSets/Main/train.txt` and `val.txt`."""
    splits = {
        line.split()[0]: split
        for split in ("train", "val", "test")
        for path in sorted(source.rglob(f"ImageSets/Main/{split}.txt"))
        for line in path.read_text(encoding="utf-8-sig").splitlines()
        if line.strip()
    }
    pictures = _by_name(pictures_in(source))
    scenes: list[Scene] = []
    for path in sorted(source.rglob("*.xml")):
        root = read_xml(path)
        if root.tag != "annotation":
            continue
        name = root.findtext("filename", "").replace("\\", "/").rpartition("/")[2].strip() or path.stem
        picture = pictures.get(name) or pictures.get(Path(name).stem) or pictures.get(path.stem)
        if picture is None:
            raise DatasetError(f"{path}: no picture {name}")
        split = splits.get(path.stem, "" if not splits else "train")
        scenes.append(Scene(picture, split, picture.name, [_voc_shape(one, path) for one in root.iter("object")]))
    return scenes, _labels(scenes)


def _voc_shape(element: ElementTree.Element, path: Path) -> Shape:
    label, box = element.findtext("name", "").strip(), element.find("bndbox")
    if not label or box is None:
        raise DatasetError(f"{path}: expected an <object> with <name> and <bndbox>")
    x1, y1, x2, y2 = (number_in(box, side, path) for side in ("xmin", "ymin", "xmax", "ymax"))
    # VOC counts pixels from 1, and the last pixel belongs to the box.
    return Shape(label, (x1 - 1, y1 - 1, x2, y2), where=str(path))


def _read_labelme(source: Path) -> Read:
    """One JSON file per picture, beside it."""
    scenes: list[Scene] = []
    for path in sorted(source.rglob("*.json")):
        document = _json(path)
        if "shapes" not in document:
            continue
        name = str(document.get("imagePath") or path.stem).replace("\\", "/")
        places = [path.parent / name, path.parent / name.rpartition("/")[2]]
        places += [path.with_suffix(suffix) for suffix in sorted(PICTURE_SUFFIXES)]
        picture = next((one for one in places if one.is_file()), None)
        if picture is None:
            raise DatasetError(f"{path}: no picture {name}")
        scenes.append(Scene(picture, "", picture.name, _labelme_shapes(document, path)))
    return scenes, _labels(scenes)


def _labelme_shapes(document: Mapping[str, Any], path: Path) -> list[Shape]:
    """Shapes with the same group and label are parts of one object."""
    shapes: dict[object, Shape] = {}
    for number, row in enumerate(document["shapes"]):
        where = f"{path}, shape {number + 1}"
        try:
            label, kind = str(row["label"]).strip(), row.get("shape_type") or "polygon"
            points = [(float(x), float(y)) for x, y in row["points"]]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DatasetError(f"{where}: expected label and points as [[x, y], …]") from None
        if kind == "circle" and len(points) == 2:
            shape = _circle(label, points, where)
        elif kind == "rectangle" and len(points) in (2, 4):
            xs, ys = [x for x, _ in points], [y for _, y in points]
            shape = Shape(label, (min(xs), min(ys), max(xs), max(ys)), where=where)
        elif kind == "polygon":
            shape = polygon_shape(label, [side for point in points for side in point], where)
        else:
            raise DatasetError(f"{where}: expected a polygon, rectangle or circle, got {kind}")
        group = row.get("group_id")
        key = number if group is None else (label, str(group))
        shapes[key] = shape if key not in shapes else _joined(shapes[key], shape)
    return list(shapes.values())


def _circle(label: str, points: Sequence[tuple[float, float]], where: str) -> Shape:
    (x, y), (edge_x, edge_y) = points
    radius = math.hypot(edge_x - x, edge_y - y)
    angles = [2 * math.pi * step / 64 for step in range(64)]
    outline = [side for angle in angles for side in (x + radius * math.cos(angle), y + radius * math.sin(angle))]
    return polygon_shape(label, outline, where)


def _joined(one: Shape, other: Shape) -> Shape:
    (a, b, c, d), (e, f, g, h) = one.box, other.box
    parts = [*(one.segmentation or []), *(other.segmentation or [])]
    return Shape(one.label, (min(a, e), min(b, f), max(c, g), max(d, h)), parts or None, where=one.where)


def _read_cvat(source: Path) -> Read:
    """`annotations.xml` of "CVAT for images"."""
    files = [source] if source.is_file() else sorted(source.rglob("*.xml"))
    folder = source.parent if source.is_file() else source
    pictures = pictures_in(folder)
    by_path = {path.relative_to(folder).as_posix(): path for path in pictures} | _by_name(pictures)
    scenes: list[Scene] = []
    labels: dict[str, None] = {}
    for path in files:
        root = read_xml(path)
        if root.find(".//track") is not None:
            raise DatasetError(f'{path}: expected CVAT\'s "for images", got a video with tracks')
        labels |= {name.strip(): None for one in root.iterfind("meta//labels/label") if (name := one.findtext("name"))}
        for image in root.iterfind("image"):
            name = image.get("name", "")
            picture = by_path.get(name) or by_path.get(f"images/{name}") or by_path.get(name.rpartition("/")[2])
            if picture is None:
                raise DatasetError(f"{path}: no picture {name}")
            split = _SPLITS.get(image.get("subset", "").lower(), "")
            scenes.append(Scene(picture, split, picture.name, list(_cvat_shapes(image, path))))
    used = _labels(scenes)
    return scenes, [name for name in labels if name in used] + [name for name in used if name not in labels]


def _cvat_shapes(image: ElementTree.Element, path: Path) -> Iterator[Shape]:
    where = f"{path}, image {image.get('name')}"
    for element in image:
        label = element.get("label", "").strip()
        if element.tag == "box":
            x1, y1, x2, y2 = (number_in(element, side, path) for side in ("xtl", "ytl", "xbr", "ybr"))
            yield Shape(label, (x1, y1, x2, y2), where=where)
        elif element.tag == "polygon":
            try:
                points = [float(side) for point in element.get("points", "").split(";") for side in point.split(",")]
            except ValueError:
                raise DatasetError(f"{where}: expected points as x,y;x,y;…") from None
            yield polygon_shape(label, points, where)
        elif element.tag == "mask":
            yield _cvat_mask(element, image, label, where, path)
        elif element.tag in ("polyline", "points", "ellipse", "cuboid", "skeleton"):
            raise DatasetError(f"{where}: expected boxes, polygons or masks, got a {element.tag}")


def _cvat_mask(element: ElementTree.Element, image: ElementTree.Element, label: str, where: str, path: Path) -> Shape:
    """Run lengths row by row within a box, zeros first, as COCO's."""
    left, top, width, height = (int(number_in(element, side, path)) for side in ("left", "top", "width", "height"))
    try:
        runs = [int(one) for one in element.get("rle", "").split(",")]
    except ValueError:
        runs = []
    if min(runs, default=-1) < 0 or sum(runs) != width * height:
        raise DatasetError(f"{where}: expected run lengths that add up to {width} x {height} pixels")
    size = tuple(int(number_in(image, side, path)) for side in ("height", "width"))
    if min(left, top) < 0 or top + height > size[0] or left + width > size[1]:
        raise DatasetError(f"{where}: expected a mask within its image of {size[1]} x {size[0]}")
    bitmap = np.zeros(size, np.uint8, order="F")
    bitmap[top : top + height, left : left + width] = (
        np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8).reshape(height, width)
    )
    return Shape(label, (left, top, left + width, top + height), plain_rle(coco_mask.encode(bitmap)), where=where)


def _by_name(pictures: Sequence[Path]) -> dict[str, Path]:
    return {path.stem: path for path in pictures} | {path.name: path for path in pictures}


def _labels(scenes: Sequence[Scene]) -> list[str]:
    return sorted({shape.label for scene in scenes for shape in scene.shapes})
