"""The ids that images and labels have in COCO results: those of a data set's annotations, or names and numbers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from service.errors import InvalidRequestError
from service.structures import Coco, ModelInfo

_UNNAMED_CATEGORY = 0


def text_of(path: PurePath | str) -> str:
    """A path as text that can be printed and be in JSON, whatever bytes it has."""
    return os.fsencode(path).decode(errors="replace")


@dataclass(frozen=True, slots=True, eq=False)
class CocoIds:
    """Without annotations, an image's id is the number or name of its file, and a label's id is the model's.

    Attributes:
        path: of the annotations.
        images: ids by file name without folders; None without annotations.
        categories: ids by name; None without annotations.
    """

    path: Path | None = None
    images: Mapping[str, int | str] | None = None
    categories: Mapping[str, int] | None = None

    @classmethod
    def of(cls, annotations: Path | None) -> CocoIds:
        """Read them.

        Raises:
            ServiceError: the file cannot be read or is not COCO's, or two of its images have one file name.
        """
        if annotations is None:
            return cls()
        from service.training.coco.tables import read_document

        document = read_document(annotations)
        images = _column(annotations, document, "images", "file_name")
        names = [PurePath(name).name for name, _ in images]
        [(name, count), *_] = [*Counter(names).most_common(1), ("", 0)]
        if count > 1:
            raise InvalidRequestError(
                f"{annotations}: {count} images are called {name}, so names do not tell their ids"
            )
        by_name = dict(zip(names, (one for _, one in images), strict=True))
        return cls(annotations, by_name, dict(_column(annotations, document, "categories", "name")))

    def has(self, file: Path) -> bool:
        """Whether a file is one of the data set's images."""
        return self.images is None or file.name in self.images

    def labels(self, info: ModelInfo) -> Sequence[str] | None:
        """The labels to ask the model for: those that the data set has; None for all.

        Raises:
            InvalidRequestError: it has none of them.
        """
        if self.categories is None or self.categories.keys() >= set(info.labels):
            return None
        if not (known := [label for label in info.labels if label in self.categories]):
            raise InvalidRequestError(
                f"{self.path}: none of its categories ({', '.join(self.categories)}) is a label of {info.key} "
                f"({', '.join(info.labels)})"
            )
        return known

    def form(self, file: Path, info: ModelInfo, *, with_masks: bool) -> Coco:
        """How one image's results are written."""
        from service.api.options import image_id_of

        categories = self.categories
        return Coco(
            image_id_of(text_of(file.name)) if self.images is None else self.images[file.name],
            with_masks,
            None if categories is None else tuple(categories.get(label, _UNNAMED_CATEGORY) for label in info.labels),
        )


def _column(path: Path, document: Mapping[str, Any], table: str, name: str) -> list[tuple[str, Any]]:
    """The names in a table, and their ids."""
    rows = [row if isinstance(row, dict) else {} for row in document[table]]
    for place, row in enumerate(rows):
        if not isinstance(row.get("id"), int | str) or not isinstance(row.get(name), str):
            raise InvalidRequestError(f"{path}: {table}[{place}]: expected id and {name}, got {str(row)[:100]}")
    return [(row[name], row["id"]) for row in rows]
