"""`roiserve detect`: the server's own pipeline over files, without a server. Words, progress and files only; the rooms
that the server uses do the work.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from service.commands._coco import CocoIds, text_of
from service.commands._options import DEFAULT_STORE, StoreOption
from service.errors import InvalidRequestError, ServiceError

if TYPE_CHECKING:
    from service.api.options import DetectParameters, ResolvedOptions
    from service.api.state import LoadedModels
    from service.settings import Settings
    from service.structures import ModelInfo
    from service.workers.local import LocalDetector

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
"""What is taken from a folder; a file that is named itself may be called anything."""
FILES_IN_FLIGHT = 16
_DRAWN = ".drawn.png"


@dataclass(frozen=True, slots=True, eq=False)
class _Result:
    """One file's answer as the server would write it, the drawn picture (PNG) and the COCO results if they are wanted,
    and the labels.
    """

    document: dict[str, object]
    drawn: bytes | None
    coco: bytes
    labels: Counter[str]

    def summary(self) -> str:
        """How many of each label were found."""
        return ", ".join(f"{count} {label}" for label, count in self.labels.most_common()) or "nothing found"


def detect(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Pictures, and folders of pictures.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for NAME.json and NAME.drawn.png of each picture; made if missing."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line instead of a summary.")] = False,
    model: Annotated[
        str | None, typer.Option(help="NAME or NAME@VERSION; the first model with masks if unset.")
    ] = None,
    score_thresh: Annotated[float | None, typer.Option(min=0, max=1, help="Keep scores above this.")] = None,
    max_detections: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Keep at most so many, best first.")
    ] = None,
    labels: Annotated[
        list[str] | None, typer.Option("--label", "--labels", help="Keep only this label; may be repeated.")
    ] = None,
    masks: Annotated[
        Literal["rle", "polygons", "png", "crop", "none"] | None, typer.Option(help="Form of the masks in the JSON.")
    ] = None,
    coco: Annotated[
        Path | None, typer.Option(help="File for the COCO results of all pictures together, for pycocotools.")
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="COCO annotations from which --coco takes the ids of images (by file name) and labels."),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    engine: Annotated[
        Literal["auto", "eager", "compiled", "graphs", "openvino"],
        typer.Option(help="What runs the network; auto: the fastest."),
    ] = "auto",
) -> None:
    """Detect objects in files, with the answers that the server would give.

    A file that cannot be read or is no picture is named, the others are answered, and the exit status is 1.

    Example: roiserve detect photo.jpg more/ --out drawn/
    """
    from service.commands._preflight import check_models
    from service.commands.serve import read_settings

    settings = read_settings(
        {"model_store": store, "models": (model,) if model else (), "device": device, "engine": engine}
    )
    if annotations is not None and coco is None:
        raise InvalidRequestError("--annotations says what ids --coco writes; give both")
    ids = CocoIds.of(annotations)
    pictures = _of_data_set(_pictures(files), ids)
    if out is not None:
        _refuse_to_overwrite(pictures, out)
    check_models(settings)
    if out is not None:
        _make_folder(out)
    # Imported here, so that `roiserve --help`, and what is wrong so far, need not wait for torch.
    from service.api.options import DetectParameters

    parameters = DetectParameters(score_thresh=score_thresh, max_detections=max_detections, labels=labels, masks=masks)
    failed = asyncio.run(_detect_files(pictures, settings, parameters, out=out, as_json=json, coco=coco, ids=ids))
    if failed:
        typer.secho(f"{failed} of {len(pictures)} files failed", fg="red", err=True)
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Picture:
    """A file, and where what is made of it goes below `--out`: there with `.drawn.png` and `.json` added."""

    file: Path
    target: Path


def _of_data_set(pictures: Sequence[_Picture], ids: CocoIds) -> Sequence[_Picture]:
    found = [one for one in pictures if ids.has(one.file)]
    if not found:
        raise InvalidRequestError(f"{ids.path}: none of the pictures is one of its images")
    if others := len(pictures) - len(found):
        typer.echo(f"{others} of {len(pictures)} pictures are not in {ids.path}, and are left out", err=True)
    return found


def _refuse_to_overwrite(pictures: Sequence[_Picture], out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InvalidRequestError(f"expected a folder for --out, got the file {out}")
    taken: dict[Path, Path] = {}
    for picture in pictures:
        if (other := taken.setdefault(picture.target, picture.file)) != picture.file:
            raise InvalidRequestError(
                f"{other} and {picture.file} would both be written to {out / picture.target}.json; "
                "give them one --out each"
            )


def _pictures(files: Sequence[Path]) -> list[_Picture]:
    """The files themselves, also those that are not there, and of folders all pictures below them, by name.

    Raises:
        InvalidRequestError: none of them is there, or there are no pictures.
    """
    if not any(file.exists() for file in files):
        raise InvalidRequestError(f"no such file: {', '.join(map(str, files))}")
    found: list[tuple[Path, Path]] = []
    for file in files:
        if file.is_dir():
            below = sorted(one for one in file.rglob("*") if one.suffix.lower() in PICTURE_SUFFIXES and _is_file(one))
            # What an earlier run has drawn into this folder is no question.
            found += [(one, one.relative_to(file)) for one in below if not one.name.endswith(_DRAWN)]
        else:
            found.append((file, Path(file.name)))
    if not found:
        raise InvalidRequestError(f"no pictures in {', '.join(map(str, files))}")
    # a.jpg becomes a.json; where a.png is there too, each keeps its suffix.
    bare = Counter(name.with_suffix("") for name in {name for _, name in found})
    return [_Picture(file, name.with_suffix("") if bare[name.with_suffix("")] == 1 else name) for file, name in found]


def _is_file(path: Path) -> bool:
    """Not a folder, a pipe or a device; a link to nothing counts, so that it is reported."""
    return path.is_file() or not path.exists()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequestError(f"{folder}: cannot be written: {error.strerror}") from None


def _write(path: Path, data: bytes) -> None:
    """Write a file; on a full disk leave none rather than a part of one."""
    try:
        path.write_bytes(data)
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise InvalidRequestError(f"{path}: cannot be written: {error.strerror}") from None


async def _detect_files(
    pictures: Sequence[_Picture],
    settings: Settings,
    parameters: DetectParameters,
    *,
    out: Path | None,
    as_json: bool,
    coco: Path | None,
    ids: CocoIds,
) -> int:
    """Send every file through the pipeline, a few at a time, and report in order; returns how many failed."""
    from rich.console import Console
    from rich.progress import Progress

    from service.api.options import resolve_options

    failed, coco_results = 0, []
    async with _open_detector(settings) as (detector, models):
        info = models.find(parameters.model)
        if parameters.labels is None:
            parameters = parameters.model_copy(update={"labels": ids.labels(info)})
        resolved = resolve_options(parameters, info)
        console = Console(stderr=True)
        with Progress(console=console, disable=len(pictures) < 2 or not console.is_terminal) as progress:
            task = progress.add_task(info.key, total=len(pictures))
            for first in range(0, len(pictures), FILES_IN_FLIGHT):
                some = pictures[first : first + FILES_IN_FLIGHT]
                coming = (
                    _detect_file(one.file, detector, info, resolved, draw=out is not None, ids=ids if coco else None)
                    for one in some
                )
                for picture, result in zip(some, await asyncio.gather(*coming), strict=True):
                    failed += isinstance(result, ServiceError)
                    _report(picture, result, out=out, as_json=as_json)
                    if isinstance(result, _Result) and result.labels:
                        coco_results.append(result.coco[1:-1])
                    progress.advance(task)
    if coco is not None:
        _write(coco, b"[" + b",\n".join(coco_results) + b"]\n")
    return failed


@asynccontextmanager
async def _open_detector(settings: Settings) -> AsyncIterator[tuple[LocalDetector, LoadedModels]]:
    """What the server runs, without its HTTP: models loaded, batcher running.

    Raises:
        ServiceError: a model cannot be loaded.
    """
    from prometheus_client import CollectorRegistry

    from service.api.state import LoadedModels
    from service.metrics import Metrics
    from service.workers.local import LocalDetector
    from service.workers.stored import stored_predictors

    # Nobody can give proposals here, so a network that needs some searches for them.
    factory = partial(stored_predictors, searching=True)
    detector = LocalDetector(settings, factory, Metrics(CollectorRegistry()).observe)
    models = LoadedModels(settings.default_model)
    try:
        for info in await detector.start():
            models.add(info)
        yield detector, models
    finally:
        await detector.stop()


async def _detect_file(
    file: Path, detector: LocalDetector, info: ModelInfo, resolved: ResolvedOptions, *, draw: bool, ids: CocoIds | None
) -> _Result | ServiceError:
    from service.answers import encode
    from service.api.schemas import detections_document
    from service.structures import Answer, Drawing, Encoded, Job, Json, Progress

    progress = Progress("decode")
    form = Json(resolved.mask_format)
    try:
        job = Job(
            model=info.key,
            source=Encoded(file.read_bytes()),
            options=resolved.options,
            form=form,
            deadline=math.inf,
            progress=progress,
        )
        image, prediction = await detector.pipeline.detect(job)
    except OSError as error:
        return InvalidRequestError(f"cannot be read: {error.strerror}")
    except ServiceError as error:
        return error
    progress.enter("encode")
    found = prediction.detections
    encoded = await asyncio.to_thread(encode, form, image, found, info)
    progress.enter("done")
    drawn = await asyncio.to_thread(encode, Drawing("image/png"), image, found, info) if draw else None
    coco = b"[]"
    if ids is not None:
        coco_form = ids.form(file, info, with_masks=resolved.options.with_masks)
        coco = await asyncio.to_thread(encode, coco_form, image, found, info)
    answer = Answer(image.size, image.orientation_applied, len(found), prediction.batch_size, [encoded])
    labels = Counter(info.labels[label_id - 1] for label_id in found.labels)
    return _Result(detections_document(info, answer, progress), drawn, coco, labels)


def _report(picture: _Picture, result: _Result | ServiceError, *, out: Path | None, as_json: bool) -> None:
    from service.api.schemas import json_pieces

    file = text_of(picture.file)
    if isinstance(result, ServiceError):
        typer.secho(f"{file}: {result}", fg="red", err=True)
        document: dict[str, object] = {"file": file, "error": {"code": result.code, "detail": str(result)}}
    else:
        document = {"file": file, **result.document}
        if out is not None and result.drawn is not None:
            target = out / picture.target
            _make_folder(target.parent)
            _write(Path(f"{target}{_DRAWN}"), result.drawn)
            _write(Path(f"{target}.json"), b"".join(json_pieces(document)))
    if as_json:
        typer.echo(b"".join(json_pieces(document)))
    elif isinstance(result, _Result):
        typer.echo(f"{file}: {result.summary()}")
