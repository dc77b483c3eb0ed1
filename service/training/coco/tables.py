"""The tables of a COCO document: which pictures and categories there are, and what the labels are called."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import DatasetError
from service.training.coco.report import DataReport
from service.training.coco.values import Ids, id_of, sort_key, whole_number_of

KEYS = ("images", "annotations", "categories")


@dataclass(frozen=True, slots=True)
class DeclaredImage:
    """A row of `images`.

    Attributes:
        key: its id, by `id_of`.
        size: (height, width) in pixels; None if not given.
    """

    key: str
    file_name: str
    size: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Category:
    """A row of `categories`; `key` is its id, by `id_of`."""

    key: str
    name: str
    supercategory: str | None


def read_document(path: Path) -> Mapping[str, Any]:
    """The JSON of a COCO annotation file, in UTF-8 or UTF-16, with a byte order mark or without.

    Raises:
        DatasetError: it cannot be read, is not JSON, or lacks one of COCO's three tables.
    """
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"{path}: the COCO annotation file cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: expected JSON, got {error}") from error
    missing = [key for key in KEYS if not isinstance(raw, dict) or key not in raw]
    if missing:
        raise DatasetError(f"{path}: expected COCO's keys {', '.join(KEYS)}; missing: {', '.join(missing)}")
    wrong = [f"{key} is a {type(raw[key]).__name__}" for key in KEYS if not isinstance(raw[key], list)]
    if wrong:
        raise DatasetError(f"{path}: expected lists under {', '.join(KEYS)}; {', '.join(wrong)}")
    return raw  # type: ignore[no-any-return]  # json gives Any


def read_images(document: Mapping[str, Any], report: DataReport) -> list[DeclaredImage]:
    """The valid rows of `images`; the others are fatal for the data set."""
    if not document["images"]:
        report.stopping.append("expected at least one image, got none")
    images = []
    for place, row in enumerate(document["images"]):
        key = id_of(row.get("id")) if isinstance(row, dict) else None
        if key is None or not isinstance(row.get("file_name"), str):
            report.stopping.append(f"images[{place}]: expected id and file_name, got {_shortened(row)}")
            continue
        try:
            images.append(DeclaredImage(key, row["file_name"], _declared_size(row, report)))
        except ValueError as error:
            report.stopping.append(f"image {key}: {error}")
    report.stopping += _used_twice("image", [image.key for image in images])
    _note_texts(document["images"], "ids of images that are texts", report)
    return images


def _declared_size(row: Mapping[str, Any], report: DataReport) -> tuple[int, int] | None:
    sides = [row.get("height"), row.get("width")]
    if all(side is None for side in sides):
        return None
    height, width = (whole_number_of(side) for side in sides)
    if height is None or width is None:
        raise ValueError(f"expected width and height in pixels, got {sides[1]!r} and {sides[0]!r}")
    if not all(isinstance(side, int) for side in sides):
        report.repaired["sizes of images that are no JSON integers, but whole numbers"] += 1
    return height, width


def read_categories(document: Mapping[str, Any], report: DataReport) -> list[Category]:
    """The valid rows of `categories`, by id; the others are fatal for the data set."""
    categories = []
    for place, row in enumerate(document["categories"]):
        key = id_of(row.get("id")) if isinstance(row, dict) else None
        name = row.get("name") if isinstance(row, dict) else None
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
            report.repaired["names of categories that are numbers, taken as texts"] += 1
        if key is None or not isinstance(name, str) or not name.strip():
            report.stopping.append(f"categories[{place}]: expected id and name, got {_shortened(row)}")
            continue
        if name != name.strip():
            report.repaired["names of categories with blanks around them"] += 1
        above = row.get("supercategory")
        categories.append(Category(key, name.strip(), above if isinstance(above, str) else None))
    report.stopping += _used_twice("category", [category.key for category in categories])
    _note_texts(document["categories"], "ids of categories that are texts", report)
    return sorted(categories, key=lambda category: sort_key(category.key))


def choose_labels(
    categories: Sequence[Category],
    document: Mapping[str, Any],
    labels: Sequence[str] | None,
    report: DataReport,
    *,
    leaves_out_others: bool,
) -> tuple[tuple[str, ...], dict[str, int | None]]:
    """Map each category to a label.

    Args:
        labels: the labels and their order; if None, the file's own categories in order of their ids.
        leaves_out_others: whether categories that are not labels are skipped instead of rejected.

    Returns:
        The labels, and for each category id its label (from 1), or None if its annotations do not count.
    """
    ids = Ids(category.key for category in categories)
    references = (row.get("category_id") for row in document["annotations"] if isinstance(row, dict))
    used = Counter(key for key in map(ids.find, references) if key is not None)
    idle = [category for category in categories if _only_groups(category, categories, used, labels)]
    report.notes += [f"category {one.name!r} (id {one.key}) is used by no annotation, and ignored" for one in idle]
    counting = [category for category in categories if category not in idle]
    twice = [name for name, count in Counter(one.name for one in counting).items() if count > 1]
    report.stopping += [
        f"category {name!r} stands there {sum(one.name == name for one in counting)} times: "
        f"ids {', '.join(one.key for one in counting if one.name == name)}; a label has one id"
        for name in twice
    ]
    names = tuple(labels) if labels is not None else tuple(dict.fromkeys(one.name for one in counting))
    known = {one.name for one in counting}
    report.stopping += [
        f"label {name!r} is not among the categories: {', '.join(sorted(known)) or 'none'}{_close(name, known)}"
        for name in names
        if name not in known
    ]
    if not leaves_out_others:
        report.stopping += [
            f"category {one.name!r} is not among the labels: {', '.join(names)}; train, evaluate and data leave others "
            "out with --labels"
            for one in counting
            if one.name not in names
        ]
    if not names:
        report.stopping.append("expected at least one category, got none")
    place_of = {name: place for place, name in enumerate(names, start=1)}
    return names, {one.key: place_of.get(one.name) for one in categories}


def _only_groups(
    category: Category, categories: Sequence[Category], used: Counter[str], labels: Sequence[str] | None
) -> bool:
    """Whether no annotation uses it and it is not a label: like Roboflow's category 0, which only names the others'
    group.
    """
    if used[category.key]:
        return False
    others = [other for other in categories if other is not category]
    if any(other.name == category.name and used[other.key] for other in others):
        return True
    if labels is not None:
        return category.name not in labels
    return any(other.supercategory == category.name for other in others)


def _used_twice(kind: str, keys: Sequence[str]) -> Iterator[str]:
    for key, count in Counter(keys).items():
        if count > 1:
            yield f"{kind} {key}: the id is used {count} times; an id stands for one {kind}"


def _note_texts(rows: Sequence[Any], what: str, report: DataReport) -> None:
    texts = sum(isinstance(row, dict) and isinstance(row.get("id"), str) for row in rows)
    if texts:
        report.repaired[f"{what}, numbered anew"] += texts


def _close(name: str, known: set[str]) -> str:
    same = [one for one in known if one.casefold() == name.casefold()]
    return f"; did you mean {same[0]!r}?" if same else ""


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
