"""Files of results: one JSON object a line for each picture, written as the answers come, continued after a break, and
turned into COCO's results.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from roiserve_client.answers import Answer
from roiserve_client.errors import ProblemError, ResultsFileError, RoIServeError, UnreachableError, problem_error
from roiserve_client.images import ImageLike
from roiserve_client.progress import ProgressLine

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
# Errors that every other picture would meet as well: keys, models and options are the same for all.
_HOPELESS_CODES = frozenset({"missing_key", "key_not_allowed", "model_not_found", "route_not_found", "invalid_request"})

# How every line of a file of results begins.
_LINE_START = b'{"file":'


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one image of many.

    Attributes:
        index: which one it was, from 0.
        image: as it was given.
        answer: None if it failed.
        error: None if it did not: a `RoIServeError`, or an OSError if the file cannot be read.
    """

    index: int
    image: ImageLike
    answer: Answer | None = None
    error: RoIServeError | OSError | None = None

    def result(self) -> Answer:
        """The answer; raises the error if there is none."""
        if self.answer is None:
            assert self.error is not None
            raise self.error
        return self.answer


@dataclass(frozen=True, slots=True)
class FolderSummary:
    """What became of a folder's pictures.

    Attributes:
        answered: how many have an answer now.
        failed: how many have an error instead.
        skipped: how many had an answer before.
    """

    answered: int
    failed: int
    skipped: int


class FolderRun:
    """One run over a folder: which pictures are left to do, and the file that their outcomes go to.

    Entering opens the file, or makes it; leaving closes it.

    Args:
        options: those of the requests; lines say them, so that no file mixes two kinds of answers.

    Raises:
        OSError: the folder cannot be read or the file not be written.
        ResultsFileError: the file was written with other options, or is none of ours.
    """

    def __init__(self, folder: Path, out: Path, options: Mapping[str, Any], *, progress: bool) -> None:
        if not folder.is_dir():
            raise NotADirectoryError(f"no such folder: {folder}")
        self._folder = folder
        self._out = out
        self._options = _plain(options)
        answered = self._continue() if out.exists() else set()
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
        self.paths = [path for path in found if self._name(path) not in answered]
        """The pictures that have no answer yet, by name."""
        self._skipped = len(found) - len(self.paths)
        self._answered = self._failed = 0
        self._progress = ProgressLine(len(self.paths)) if progress else None

    def __enter__(self) -> Self:
        self._file: IO[bytes] = self._out.open("ab")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if self._progress is not None:
            self._progress.finish()

    @property
    def summary(self) -> FolderSummary:
        """The numbers so far."""
        return FolderSummary(self._answered, self._failed, self._skipped)

    def add(self, outcome: Outcome) -> None:
        """Write the outcome of a picture.

        Raises:
            UnreachableError, ProblemError: one that all the other pictures would meet, too; it is not written.
        """
        if isinstance(outcome.error, UnreachableError):
            raise outcome.error
        if isinstance(outcome.error, ProblemError) and outcome.error.code in _HOPELESS_CODES:
            raise outcome.error
        assert isinstance(outcome.image, Path)
        head = {"file": self._name(outcome.image), "options": self._options}
        body = _error_members(outcome.error) if outcome.answer is None else outcome.answer.document
        self._file.write(json.dumps({**head, **body}, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        self._answered += outcome.answer is not None
        self._failed += outcome.answer is None
        if self._progress is not None:
            self._progress.add(has_failed=outcome.answer is None)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _continue(self) -> set[str]:
        """Cut off the line that an earlier run did not finish, and return which pictures have an answer."""
        with self._out.open("r+b") as file:
            last: dict[str, bool] = {}
            whole_bytes = 0
            for line in file:
                if not line.endswith(b"\n"):
                    if not (line.startswith(_LINE_START) or _LINE_START.startswith(line)):
                        raise _not_results(line, self._out)
                    break
                document = _parse(line, self._out)
                if document.get("options") != self._options:
                    raise ResultsFileError(
                        f"{self._out} was written with the options {document.get('options')}, not {self._options}; "
                        "use the same, or another file"
                    )
                last[document["file"]] = "error" not in document
                whole_bytes += len(line)
            file.truncate(whole_bytes)
        return {name for name, is_answered in last.items() if is_answered}


def read_results(path: str | Path) -> Iterator[tuple[str, Answer | ProblemError]]:
    """The results that `detect_folder` wrote, one by one: the file's name, and its answer or its error.

    A picture that was asked for again has its last result only.

    Raises:
        ResultsFileError: not such a file.
    """
    path = Path(path)
    with path.open("rb") as file:
        places: dict[str, int] = {}
        at = 0
        for line in file:
            if line.endswith(b"\n"):
                places[_parse(line, path)["file"]] = at
            at += len(line)
        for name, place in places.items():
            file.seek(place)
            document = _parse(file.readline(), path)
            if "error" in document:
                yield name, problem_error(document["error"].get("status", 0), document["error"])
            else:
                yield (
                    name,
                    Answer.from_json({key: one for key, one in document.items() if key not in ("file", "options")}),
                )


def write_coco_results(results: str | Path, annotations: str | Path, out: str | Path) -> Sequence[str]:
    """Turn a file of `detect_folder` into COCO's results, which `pycocotools` evaluates against the annotations.

    Images are found by their name, or, if that is another folder's, by its last part; categories by their name.

    Args:
        annotations: COCO's JSON with `images` and `categories`.
        out: where to write the list of detections.

    Returns:
        The annotated images that have no answer.

    Raises:
        ResultsFileError: these are no annotations, or a picture or a label is not among them.
    """
    try:
        document = json.loads(Path(annotations).read_bytes())
        category_ids = {one["name"]: one["id"] for one in document["categories"]}
        ids = {one["file_name"]: one["id"] for one in document["images"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ResultsFileError(
            f"{annotations}: expected COCO's JSON with images and categories, each with an id and a name: {error!r}"
        ) from None
    ends = Counter(name.rpartition("/")[2] for name in ids)
    by_end = {end: ids[name] for name in ids if ends[end := name.rpartition("/")[2]] == 1}
    found: list[dict[str, Any]] = []
    missing = dict.fromkeys(ids.values())
    for name, result in read_results(results):
        if isinstance(result, ProblemError):
            continue
        image_id = ids.get(name, by_end.get(name.rpartition("/")[2]))
        if image_id is None:
            raise ResultsFileError(f"{annotations} has no image called {name}")
        missing.pop(image_id, None)
        try:
            found += result.to_coco(image_id, category_ids)
        except ValueError as error:
            raise ResultsFileError(f"{name}: {error}") from None
    Path(out).write_text(json.dumps(found))
    names = {image_id: name for name, image_id in ids.items()}
    return [names[image_id] for image_id in missing]


def _parse(line: bytes, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError:
        document = None
    if not isinstance(document, dict) or "file" not in document:
        raise _not_results(line, path)
    return document


def _not_results(line: bytes, path: Path) -> ResultsFileError:
    return ResultsFileError(f"{path} is not a file of results: {line[:80]!r}")


def _error_members(error: RoIServeError | OSError | None) -> dict[str, Any]:
    if isinstance(error, ProblemError):
        members = {"status": error.status, "code": error.code, "detail": error.detail, "request_id": error.request_id}
        return {"error": members}
    code = "unreadable_file" if isinstance(error, OSError) else "no_answer"
    return {"error": {"code": code, "detail": str(error)}}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they come back from JSON."""
    given = {
        name: value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        for name, value in options.items()
        if value is not None
    }
    plain: dict[str, Any] = json.loads(json.dumps(given))
    return plain
