"""The pictures of a data set: find the files that an annotation file refers to, and check each one in advance, in
threads.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from service.cores import available_cores
from service.errors import InvalidRequestError, OutOfMemoryError
from service.imaging.containers import read_container
from service.imaging.decode import ImageLimits, decode_image
from service.imaging.formats import sniff_format

PICTURE_LIMITS = ImageLimits(max_image_pixels=500_000_000)
"""Generous: unlike requests, data sets are trusted."""
_MAX_INDEXED_FILES = 5_000_000


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """Facts read from a picture's file.

    Attributes:
        stored_size: (height, width) in pixels, before EXIF's orientation is applied.
        orientation: EXIF's, 1 to 8.
        digest: of the file's bytes.
        problem: why it cannot be read; None if it decodes.
    """

    stored_size: tuple[int, int] = (0, 0)
    orientation: int = 1
    digest: str = ""
    problem: str | None = None

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) as shown."""
        height, width = self.stored_size
        return (width, height) if self.orientation >= 5 else (height, width)


def look_at(path: Path) -> PictureFacts:
    """Read and decode a picture, as training and evaluation will. Raises only on bugs of our own."""
    try:
        data = path.read_bytes()
        container = read_container(data, sniff_format(data))
        # The header alone would not reveal truncation or damage further on.
        decode_image(data, limits=PICTURE_LIMITS)
    except OSError as error:
        return PictureFacts(problem=f"cannot be read: {error.strerror}")
    except (InvalidRequestError, OutOfMemoryError) as error:
        return PictureFacts(problem=str(error))
    except Exception as error:  # container readers fail on broken data in many ways
        return PictureFacts(problem=f"is damaged: {error}")
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return PictureFacts(container.image_size, container.orientation, digest)


def look_at_all(paths: Sequence[Path], *, advance: Callable[[], None] = lambda: None) -> list[PictureFacts]:
    """`look_at` for each path, in order, with one thread per core.

    Args:
        advance: called after every picture.
    """
    facts = []
    with ThreadPoolExecutor(max_workers=available_cores(), thread_name_prefix="pictures") as pool:
        for one in pool.map(look_at, paths):
            facts.append(one)
            advance()
    return facts


class PictureFinder:
    """Finds the files that `file_name` refers to, even if written by other tools or on other machines.

    Looks in `images/` beside the annotation file, beside the file itself, in `images/` beside its folder, and in the
    sibling of its folder named like the end of the file's name, as in COCO (`annotations/instances_val2017.json`,
    `val2017/`).
    """

    def __init__(self, annotation_file: Path) -> None:
        folder = annotation_file.parent
        named = folder.parent / annotation_file.stem.rpartition("_")[2]
        self.roots = [one for one in (folder / "images", folder, folder.parent / "images", named) if one.is_dir()]

    def find(self, file_name: str) -> tuple[Path, bool] | None:
        """The file, and whether its name had to be interpreted; None if there is no such file."""
        for name in (file_name, file_name.replace("\\", "/"), unquote(file_name).replace("\\", "/")):
            if path := self._file(name):
                return path, name != file_name
        # A path from another machine or folder: use its longest suffix that exists here.
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        for start in range(len(parts)):
            tail = "/".join(parts[start:])
            if path := self._file(tail) or self._by_folded_name.get(_folded(tail)):
                return path, True
        return None

    def _file(self, name: str) -> Path | None:
        try:
            return next((path for root in self.roots if (path := root / name).is_file()), None)
        except (OSError, ValueError):  # an overlong name, or one with a NUL
            return None

    @cached_property
    def _by_folded_name(self) -> dict[str, Path | None]:
        """Every file by its path below a root, with case and Unicode forms normalised; None if ambiguous."""
        index: dict[str, Path | None] = {}
        for path, root in self._walk():
            key = _folded(path.relative_to(root).as_posix())
            known = index.setdefault(key, path)
            if known is not None and known.parent == path.parent and known != path:
                index[key] = None
        return index

    def _walk(self) -> Iterator[tuple[Path, Path]]:
        number = 0
        for root in self.roots:
            for folder, _, files in os.walk(root):
                for file in files:
                    number += 1
                    if number > _MAX_INDEXED_FILES:
                        return
                    yield Path(folder, file), root


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
