"""`roiserve detect`: the server's own pipeline over files, without a server. Words, progress and files only; the
work is done by the rooms that `service/app.py` wires.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from service.errors import InvalidRequestError, ServiceError

if TYPE_CHECKING:
    from service.api.options import DetectParameters, Wish
    from service.api.state import ApiState
    from service.pipeline import Predictor
    from service.settings import Settings
    from service.structures import Detections, Image

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
"""What is taken from a folder; a file that is named itself may be called anything."""
FILES_IN_FLIGHT = 16


@dataclass(frozen=True, slots=True, eq=False)
class _Result:
    """One file's answer as the server would write it, and the drawn picture (PNG) if one is wanted."""

    document: dict[str, object]
    drawn: bytes | None

    def summary(self) -> str:
        """How many of each label were found."""
        detections = self.document["detections"]
        assert isinstance(detections, list)
        counts = Counter(detection["label"] for detection in detections)
        return ", ".join(f"{count} {label}" for label, count in counts.most_common()) or "nothing found"


def detect(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Pictures, and folders of pictures.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the drawn pictures and a JSON file for each; made if missing.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line instead of a summary.")] = False,
    model: Annotated[
        str | None, typer.Option(help="NAME or NAME@VERSION; the first model with masks if unset.")
    ] = None,
    score_thresh: Annotated[float | None, typer.Option(min=0, max=1, help="Keep scores above this.")] = None,
    max_detections: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Keep at most so many, best first.")
    ] = None,
    labels: Annotated[list[str] | None, typer.Option("--label", help="Keep only this label; may be repeated.")] = None,
    masks: Annotated[
        Literal["rle", "polygons", "png", "crop", "none"] | None, typer.Option(help="Form of the masks in the JSON.")
    ] = None,
    store: Annotated[Path, typer.Option(envvar="ROISERVE_MODEL_STORE", help="The model store.")] = Path("model_store"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Detect objects in files, with the answers that the server would give.

    Example: roiserve detect photo.jpg more/ --out drawn/
    """
    pictures = _pictures(files)
    if out is not None:
        _refuse_to_overwrite(pictures, out)
    # Imported here, so that `roiserve --help` need not wait for torch.
    from service.api.options import DetectParameters
    from service.commands.serve import read_settings

    settings = read_settings({"model_store": store, "models": (model,) if model else (), "device": device})
    parameters = DetectParameters(score_thresh=score_thresh, max_detections=max_detections, labels=labels, masks=masks)
    failed = asyncio.run(_detect_files(pictures, settings, parameters, out=out, as_json=json))
    if failed:
        typer.secho(f"{failed} of {len(pictures)} files failed", fg="red", err=True)
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Picture:
    """A file, and where what is made of it goes below `--out`: there with `.png` and `.json` added."""

    file: Path
    target: Path


def _refuse_to_overwrite(pictures: Sequence[_Picture], out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InvalidRequestError(f"expected a folder for --out, got the file {out}")
    taken: dict[Path, Path] = {}
    for picture in pictures:
        if (other := taken.setdefault(picture.target, picture.file)) != picture.file:
            raise InvalidRequestError(
                f"{other} and {picture.file} would both be written to {out / picture.target}; give them one --out each"
            )


def _pictures(files: Sequence[Path]) -> list[_Picture]:
    """The files themselves, and of folders all pictures below them, by name.

    Raises:
        InvalidRequestError: something is not there, or there are no pictures.
    """
    if missing := [str(file) for file in files if not file.exists()]:
        raise InvalidRequestError(f"no such file: {', '.join(missing)}")
    pictures: list[_Picture] = []
    for file in files:
        if file.is_dir():
            found = sorted(one for one in file.rglob("*") if one.suffix.lower() in PICTURE_SUFFIXES)
            pictures += [_Picture(one, one.relative_to(file)) for one in found]
        else:
            pictures.append(_Picture(file, Path(file.name)))
    if not pictures:
        raise InvalidRequestError(f"no pictures in {', '.join(map(str, files))}")
    return pictures


async def _detect_files(
    pictures: Sequence[_Picture], settings: Settings, parameters: DetectParameters, *, out: Path | None, as_json: bool
) -> int:
    """Send every file through the pipeline, a few at a time, and report in order; returns how many failed."""
    from rich.console import Console
    from rich.progress import Progress

    from service.api.options import understand

    failed = 0
    async with _open_service(settings) as state:
        predictor = state.models.find(parameters.model)
        wish = understand(parameters, predictor.info)
        console = Console(stderr=True)
        with Progress(console=console, disable=len(pictures) < 2 or not console.is_terminal) as progress:
            task = progress.add_task(predictor.info.key, total=len(pictures))
            for first in range(0, len(pictures), FILES_IN_FLIGHT):
                some = pictures[first : first + FILES_IN_FLIGHT]
                coming = (_detect_file(one.file, state, predictor, wish, draw=out is not None) for one in some)
                for picture, result in zip(some, await asyncio.gather(*coming), strict=True):
                    failed += isinstance(result, ServiceError)
                    _report(picture, result, out=out, as_json=as_json)
                    progress.advance(task)
    return failed


@asynccontextmanager
async def _open_service(settings: Settings) -> AsyncIterator[ApiState]:
    """The app without its HTTP: models loaded, batcher running.

    Raises:
        ServiceError: a model cannot be loaded.
    """
    from service.api.state import Phase
    from service.app import create_app

    app = create_app(settings)
    state: ApiState = app.state.api
    async with app.router.lifespan_context(app):
        while state.lifecycle.phase is Phase.LOADING:
            if state.lifecycle.failure is not None:
                raise state.lifecycle.failure
            await asyncio.sleep(0.02)
        yield state


async def _detect_file(
    file: Path, state: ApiState, predictor: Predictor, wish: Wish, *, draw: bool
) -> _Result | ServiceError:
    from service.api.schemas import detections_document
    from service.pipeline import Answer, Job, Progress

    def encode(image: Image, detections: Detections) -> tuple[Sequence[object] | None, bytes | None]:
        return wish.encode(image, detections), _draw(image, detections, predictor) if draw else None

    progress = Progress("decode")
    try:
        job = Job(
            predictor=predictor, data=file.read_bytes(), options=wish.options, deadline=math.inf, progress=progress
        )
        answer = await state.pipeline.run(job, encode)
    except OSError as error:
        return InvalidRequestError(f"cannot be read: {error.strerror}")
    except ServiceError as error:
        return error
    masks, drawn = answer.encoded
    undrawn = Answer(answer.image_size, answer.orientation_applied, answer.detections, masks, answer.batch_size)
    return _Result(detections_document(predictor.info, undrawn, progress), drawn)


def _draw(image: Image, detections: Detections, predictor: Predictor) -> bytes:
    from service.imaging.overlay import draw_detections, encode_picture

    return encode_picture(draw_detections(image, detections, predictor.info.labels), "png")


def _report(picture: _Picture, result: _Result | ServiceError, *, out: Path | None, as_json: bool) -> None:
    import orjson

    file = picture.file
    if isinstance(result, ServiceError):
        typer.secho(f"{file}: {result}", fg="red", err=True)
        document: dict[str, object] = {"file": str(file), "error": {"code": result.code, "detail": str(result)}}
    else:
        document = {"file": str(file), **result.document}
        if out is not None and result.drawn is not None:
            # Suffixes are added, not replaced, so that a.jpg and a.png do not meet.
            target = out / picture.target
            target.parent.mkdir(parents=True, exist_ok=True)
            Path(f"{target}.png").write_bytes(result.drawn)
            Path(f"{target}.json").write_bytes(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))
    if as_json:
        typer.echo(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))
    elif isinstance(result, _Result):
        typer.echo(f"{file}: {result.summary()}")
