"""A JPEG to its JSON answer, in one process and one thread, against the service that a user would write:
`python -m benchmarks.request`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from benchmarks._answers import OurService, StraightforwardService
from benchmarks._detectors import (
    as_image,
    as_jpeg,
    bundled_models,
    example_picture,
    our_predictor,
    picture_for,
    random_detector,
    store_detector,
    torchvision_twin,
)
from benchmarks._measure import (
    REPORTS,
    Cell,
    Report,
    alternate,
    let_compile,
    megabytes,
    milliseconds,
    peak_memory_bytes,
    ratio,
)
from benchmarks._quantised import quantised
from service.inference.predictor import Predictor
from service.model_store.store import StoredModel

SIZES = {"480p": (640, 480), "1080p": (1920, 1080)}
COLUMNS = [
    "model",
    "picture",
    "engine",
    "objects (theirs, ours)",
    "straightforward ms",
    "ours ms",
    "times faster",
    "straightforward MB",
    "ours MB",
    "decode, predict, encode ms",
]


def main(
    rounds: Annotated[int, typer.Option(help="How often each side is timed.")] = 9,
    threads: Annotated[int, typer.Option(help="For torch.")] = 2,
    engine: Annotated[str, typer.Option(help="Of our predictor.")] = "auto",
    builder: Annotated[
        str, typer.Option(help="Which of torchvision's detectors to measure.")
    ] = "maskrcnn_resnet50_fpn",
    precision: Annotated[
        str, typer.Option(help="Of our predictor: auto, or such as int8, for which random weights are quantised first.")
    ] = "auto",
    sizes: Annotated[str, typer.Option(help="Of the pictures, separated by commas.")] = ",".join(SIZES),
    quick: Annotated[bool, typer.Option(help="One round, the bundled models only: does it run?")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = REPORTS,
) -> None:
    """Print a table: the straightforward service and ours, for one torchvision model and for the bundled ones."""
    torch.set_num_threads(threads)
    report = Report("request", out)
    rounds = 1 if quick else rounds
    rows: list[list[Cell]] = []
    for name, sides in _services(builder, engine, precision, quick=quick):
        for picture in ["480p"] if quick else sizes.split(","):
            rows.append(_row(name, picture, *sides, rounds=rounds))
            report.table("JPEG to JSON, one picture at a time", COLUMNS, rows)
            print(f"measured {name} {picture}", flush=True)
    report.show()


Sides = tuple[StraightforwardService, Predictor]


def _services(builder: str, engine: str, precision: str, *, quick: bool) -> Iterator[tuple[str, Sides]]:
    if not quick:
        with _stored_random(builder, engine, precision) as sides:
            yield builder, sides
    for stored in bundled_models():
        straightforward = StraightforwardService(torchvision_twin(stored), stored.model_toml.labels)
        yield stored.name, (straightforward, _ours(stored, engine, precision))


@contextmanager
def _stored_random(builder: str, engine: str, precision: str) -> Iterator[Sides]:
    model = random_detector(builder, as_image(example_picture(*SIZES["1080p"])))
    with TemporaryDirectory() as folder:
        predictor = _ours(store_detector(model, builder, Path(folder)), engine, precision)
        yield StraightforwardService(model, predictor.info.labels), predictor


def _ours(stored: StoredModel, engine: str, precision: str) -> Predictor:
    return our_predictor(quantised(stored) if precision == "int8" else stored, engine, precision=precision)


def _row(
    model: str, size: str, straightforward: StraightforwardService, predictor: Predictor, *, rounds: int
) -> list[Cell]:
    jpeg = as_jpeg(example_picture(*SIZES[size], name=picture_for(model)))
    ours = OurService(predictor)
    sides: dict[str, Callable[[], bytes]] = {
        "straightforward": lambda: straightforward.answer([jpeg])[0],
        "ours": lambda: ours.answer([jpeg])[0],
    }
    objects = [len(json.loads(call())["detections"]) for call in sides.values()]
    memory = [megabytes(peak_memory_bytes(call)) for call in sides.values()]
    let_compile(sides["ours"])
    seconds = alternate(sides, rounds=rounds, warm_up=False)
    stages = json.loads(sides["ours"]())["timings_ms"]
    return [
        model,
        size,
        f"{predictor.info.engine}, {predictor.info.precision}",
        f"{objects[0]}, {objects[1]}",
        milliseconds(seconds["straightforward"]),
        milliseconds(seconds["ours"]),
        ratio(seconds["straightforward"], seconds["ours"]),
        *memory,
        ", ".join(f"{stages[stage]:.1f}" for stage in ("decode", "inference", "encode")),
    ]


if __name__ == "__main__":
    typer.run(main)
