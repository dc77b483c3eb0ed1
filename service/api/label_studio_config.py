"""Reads a Label Studio project's labeling configuration, XML: where regions can go, and with which labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn
from xml.parsers import expat

from service.errors import InvalidRequestError, TooLargeError
from service.structures import RegionType

_CONTROLS: Mapping[str, RegionType] = {
    "RectangleLabels": "rectanglelabels",
    "PolygonLabels": "polygonlabels",
    "BrushLabels": "brushlabels",
}
# Thousands of labels take a tenth of this.
_MAX_CHARACTERS = 1024 * 1024
# Every object is written once for each tag that takes its label, with the tag's names.
_MAX_TAGS = 50
_MAX_NAME_CHARACTERS = 1000


@dataclass(frozen=True, slots=True)
class Control:
    """A tag such as `<RectangleLabels name="box" toName="image">`: a place for regions of an image.

    Attributes:
        from_name: the tag's name.
        to_name: the name of the image's tag.
        data_key: under which a task's data has the image.
        labels: of its regions.
        score_thresh: keep what scores above this; from the attribute `model_score_threshold`, None without it.
    """

    type: RegionType
    from_name: str
    to_name: str
    data_key: str
    labels: tuple[str, ...]
    score_thresh: float | None = None

    def match(self, names: tuple[str, ...]) -> dict[str, str]:
        """This tag's label for each of the names that it has, if not exactly, then in other letter case."""
        folded = {label.casefold(): label for label in reversed(self.labels)}
        exact = set(self.labels)
        return {
            name: name if name in exact else folded[name.casefold()]
            for name in names
            if name in exact or name.casefold() in folded
        }


def read_controls(config: str) -> list[Control]:
    """The tags of a configuration that take rectangles, polygons or brush strokes in an image, in order.

    Document type declarations are refused, so that no entity can expand or refer to a file.

    Raises:
        InvalidRequestError: it is not XML, or has no such tag.
        TooLargeError: it is longer, or has more tags or longer names, than any project's configuration.
    """
    if len(config) > _MAX_CHARACTERS:
        raise TooLargeError(
            f"label_config has {len(config)} characters, at most {_MAX_CHARACTERS} are read; the longest known have "
            "some tens of thousands"
        )
    reader = _Reader()
    # The text is encoded here, whatever encoding its declaration names.
    parser = expat.ParserCreate("utf-8")
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(config.encode(errors="replace"), True)
    except expat.ExpatError as error:
        raise InvalidRequestError(f"label_config is not XML: {error}") from None
    controls = reader.controls()
    if len(controls) > _MAX_TAGS:
        raise TooLargeError(f"label_config has {len(controls)} tags that take objects; at most {_MAX_TAGS} are read")
    if not controls:
        raise InvalidRequestError(
            "label_config has no tag that takes objects: expected RectangleLabels, PolygonLabels or BrushLabels whose "
            "toName is the name of an Image with a value such as $image"
        )
    return controls


class _Reader:
    """Collects the tags as the parser meets them."""

    def __init__(self) -> None:
        self._images: dict[str, str] = {}
        self._tags: list[tuple[RegionType, dict[str, str], list[str]]] = []
        self._open: str | None = None

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "Image" and attributes.get("value", "").startswith("$"):
            self._images[attributes.get("name", "")] = attributes["value"][1:]
        elif tag in _CONTROLS:
            self._open = tag
            self._tags.append((_CONTROLS[tag], attributes, []))
        elif tag == "Label" and self._open is not None and "value" in attributes:
            self._tags[-1][2].append(attributes["value"])

    def end(self, tag: str) -> None:
        if tag == self._open:
            self._open = None

    def controls(self) -> list[Control]:
        found = []
        for kind, attributes, labels in self._tags:
            targets = [name.strip() for name in attributes.get("toName", "").split(",")]
            to_name = next((name for name in targets if name in self._images), None)
            if to_name is not None and "name" in attributes:
                threshold = _threshold(attributes.get("model_score_threshold"))
                data_key = self._images[to_name]
                if max(map(len, (attributes["name"], to_name, data_key))) > _MAX_NAME_CHARACTERS:
                    raise TooLargeError(f"label_config has a name of over {_MAX_NAME_CHARACTERS} characters")
                found.append(Control(kind, attributes["name"], to_name, data_key, tuple(labels), threshold))
        return found


def _threshold(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InvalidRequestError(f"label_config: model_score_threshold: expected 0 to 1, got {text[:50]!r}")
    return value


def _refuse_doctype(*_: object) -> NoReturn:
    raise InvalidRequestError("label_config has a document type declaration (<!DOCTYPE ...>); expected none")
