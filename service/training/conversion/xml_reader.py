"""Safe XML: a file that declares a document type, and could therefore define entities, is rejected."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from xml.parsers import expat

from service.errors import DatasetError

MAX_DEPTH = 100


def read_xml(path: Path) -> ElementTree.Element:
    """The root element of a file.

    Raises:
        DatasetError: it cannot be read, is not XML, declares a document type, or is nested too deeply.
    """
    builder = ElementTree.TreeBuilder()
    depth = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise DatasetError(f"{path}: expected elements at most {MAX_DEPTH} deep")
        builder.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name)

    def refuse(*_: object) -> None:
        raise DatasetError(f"{path}: declares a document type (DOCTYPE), which may hold entities and is not read")

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise DatasetError(f"{path}: expected XML, got {error}") from error
    return builder.close()


def number_in(element: ElementTree.Element, name: str, path: Path) -> float:
    """The number in the child or attribute with this name.

    Raises:
        DatasetError: there is none.
    """
    text = element.findtext(name, element.get(name, ""))
    try:
        return float(text)
    except ValueError:
        raise DatasetError(f"{path}: expected a number in <{element.tag}>'s {name}, got {text.strip()!r}") from None
