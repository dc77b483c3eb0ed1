"""Read class names in common formats (lines, JSON, YAML, COCO's categories) and bring them into the order of the
weights, without the background.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import ModelStoreError
from service.model_store.files import read_text

_BACKGROUND = frozenset({"__background__", "_background_", "background", "bg"})
_LISTS = ("categories", "names", "classes", "class_names", "labels", "id2label", "thing_classes")
"""Keys under which a document may hold its names."""
_FORMS = (
    "a name on each line, a JSON list of names, a JSON object of names by id, COCO's categories, or YAML with 'names'"
)


@dataclass(frozen=True, slots=True)
class Labels:
    """Class names as a file has them.

    Attributes:
        names: in the file's order, or by ascending id.
        ids: of each name, if the file has ids.
        groups: names that only group others, like Roboflow's first category; usually not classes themselves.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...] | None = None
    groups: frozenset[str] = frozenset()

    def fitted(self, count: int) -> tuple[str, ...]:
        """The names for `count` classes, in the order of the weights.

        If there are too many names, the background and names that only group others are left out. If the weights have a
        class for every id, as after training on COCO's own ids, gaps are filled with names like "unused 12".

        Raises:
            ModelStoreError: the number of names does not match.
        """
        ids = self.ids or range(1, len(self.names) + 1)
        rows = [(id_, name) for id_, name in zip(ids, self.names, strict=True) if name != "__background__"]
        if len(rows) > count:
            classes = [(id_, name) for id_, name in rows if name.lower() not in _BACKGROUND and name not in self.groups]
            rows = classes if len(classes) == count else rows
        if len(rows) == count:
            return category_labels([name for _, name in rows])
        by_id = dict(rows)
        if self.ids is not None and rows and len(rows) < count and min(by_id) >= 1 and max(by_id) <= count:
            return tuple(by_id.get(id_, f"unused {id_}") for id_ in range(1, count + 1))
        hint = "; leave the background out" if len(rows) == count + 1 else ""
        raise ModelStoreError(f"wrong class count: the weights know {count} classes, got {len(rows)} labels{hint}")


def category_labels(categories: Sequence[str]) -> tuple[str, ...]:
    """The categories of torchvision (given without the background), with names for the ids that COCO does not use."""
    return tuple(f"unused {id_}" if name == "N/A" else name for id_, name in enumerate(categories, start=1))


def read_labels(path: Path) -> Labels:
    """The class names in a file.

    Raises:
        ModelStoreError: not readable, not UTF-8, or in an unknown format.
    """
    text = read_text(path).removeprefix("\N{BYTE ORDER MARK}").strip()
    try:
        if text[:1] in ("[", "{"):
            return _from_document(json.loads(text))
        if path.suffix.lower() in (".yaml", ".yml") or _looks_like_yaml(text):
            return _from_document(_yaml(text))
        return _from_lines(text)
    except (ValueError, RecursionError) as error:
        raise ModelStoreError(f"{path}: expected {_FORMS}, got text that cannot be read: {str(error)[:200]}") from error
    except ModelStoreError as error:
        raise ModelStoreError(f"{path}: {error}") from error


def _looks_like_yaml(text: str) -> bool:
    """Whether some line shows that it is YAML: a plain label may also contain a colon or begin with a dash."""
    return any(line.split(":")[0].strip() in _LISTS and ":" in line for line in text.splitlines())


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML: {error}") from error


def _from_lines(text: str) -> Labels:
    lines = [line.strip() for line in text.splitlines()]
    if "" in lines or not lines:
        raise ModelStoreError(f"expected a label on each line, got none on line {lines.index('') + 1 if lines else 1}")
    return Labels(tuple(lines))


def _from_document(document: Any) -> Labels:
    if isinstance(document, Mapping):
        inner = next((document[key] for key in _LISTS if key in document), None)
        if inner is not None and not isinstance(inner, str | int):
            return _from_document(inner)
        return _by_id(document)
    if isinstance(document, list) and document and all(isinstance(one, str) for one in document):
        return Labels(tuple(one.strip() for one in document))
    if isinstance(document, list) and document and all(isinstance(one, Mapping) for one in document):
        rows = [(_id(one.get("id", place)), _name(one.get("name"))) for place, one in enumerate(document, start=1)]
        return _sorted(rows, groups=frozenset(str(one.get("supercategory")) for one in document))
    raise ModelStoreError(f"expected {_FORMS}, got {_described(document)}")


def _by_id(document: Mapping[Any, Any]) -> Labels:
    """`{"0": "cat"}`, TorchServe's `{"0": ["n02123045", "cat"]}`, or the other way round, `{"cat": 0}`."""
    pairs = list(document.items())
    if pairs and all(isinstance(value, int) and not isinstance(value, bool) for _, value in pairs):
        return _sorted([(value, _name(key)) for key, value in pairs])
    names = [value[-1] if isinstance(value, list) and value else value for _, value in pairs]
    return _sorted([(_id(key), _name(name)) for (key, _), name in zip(pairs, names, strict=True)])


def _sorted(rows: list[tuple[int, str]], *, groups: frozenset[str] = frozenset()) -> Labels:
    ids = [id_ for id_, _ in rows]
    if not rows or len(set(ids)) != len(ids):
        raise ModelStoreError(f"expected {_FORMS}, got {'an id twice' if rows else 'no names'}")
    ordered = sorted(rows)
    return Labels(tuple(name for _, name in ordered), tuple(id_ for id_, _ in ordered), groups)


def _id(value: Any) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not text.lstrip("-").isdigit() or len(text) > _LONGEST_ID:
        raise ModelStoreError(f"expected {_FORMS}, got {text[:40]!r} where a class's number was expected")
    return int(text)


_LONGEST_ID = 9


def _name(value: Any) -> str:
    if isinstance(value, bool | None) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ModelStoreError(f"expected {_FORMS}, got {_described(value)} where a name was expected")
    return str(value).strip()


def _described(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
