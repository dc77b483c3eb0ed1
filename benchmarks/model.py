"""One call of a network: our predictor, by engine, against torchvision's eager forward with the same weights, and both
against what the machine's matrix product would have made possible: `python -m benchmarks.model`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from benchmarks._detectors import (
    as_image,
    bundled_models,
    example_picture,
    our_predictor,
    picture_for,
    random_detector,
    store_detector,
    torchvision_input,
    torchvision_twin,
)
from benchmarks._measure import (
    REPORTS,
    SGEMM_SIDE,
    Cell,
    Report,
    alternate,
    best_rates,
    count_flop,
    let_compile,
    matrix_products,
    megabytes,
    milliseconds,
    peak_memory_bytes,
    ratio,
    spread,
    until_done,
)
from benchmarks._quantised import quantised
from service.errors import ModelStoreError
from service.inference.predictor import Predictor
from service.model_store.store import StoredModel
from service.structures import Image, Prediction, Query

MASK, FASTER = "maskrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn"
MOBILE = "fasterrcnn_mobilenet_v3_large_320_fpn"
SIZES = {"640x480": (640, 480), "1080p": (1920, 1080)}
STAGES = ("preprocess", "backbone", "rpn", "roi_heads", "postprocess")
COLUMNS = {
    "calls": [
        "model",
        "picture",
        "batch",
        "engine",
        "objects (theirs, ours)",
        "torchvision ms",
        "ours ms",
        "times faster",
    ],
    "limit": ["model", "picture", "batch", "engine", "GFLOP", "product GFLOP/s", "torchvision %", "ours %"],
    "stages": ["model", "picture", "batch", "engine", *STAGES],
    "memory": ["model", "picture", "batch", "engine", "torchvision MB", "ours MB"],
}
TITLES = {
    "calls": "One call: pixels to boxes, labels, scores and masks (torchvision's pasted, ours small)",
    "limit": "Share of the time that the call's operations would take at the machine's rate of matrix products",
    "stages": "Ours by stage, ms (the RPN's convolutions count as backbone)",
    "memory": "Memory that the first call of this kind added",
}


@dataclass(frozen=True)
class Case:
    """What one row of each table is about."""

    model: str
    size: str
    batch: int


def main(
    seconds: Annotated[float, typer.Option(help="Begin no further case after so many seconds.")] = 300,
    rounds: Annotated[int, typer.Option(help="How often each side is timed; fewer where a call takes long.")] = 9,
    threads: Annotated[int, typer.Option(help="For torch.")] = 2,
    engines: Annotated[str, typer.Option(help="Ours, separated by commas; eager is always added.")] = "auto",
    only: Annotated[
        str, typer.Option(help="Only models whose names contain one of these words, with commas between.")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda, for both sides.")] = "cpu",
    precision: Annotated[
        str,
        typer.Option(
            help="Ours, separated by commas, such as float32,bfloat16,int8; eager has the first alone, torchvision "
            "float32. Networks with random weights are quantised on the spot, which needs the extra quantize."
        ),
    ] = "auto",
    batches: Annotated[str, typer.Option(help="Only batches of these sizes, with commas between.")] = "1,4,8",
    quick: Annotated[bool, typer.Option(help="One round of small networks: does it run?")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = REPORTS,
) -> None:
    """Print tables of times, of shares of the limit, of stages and of memory; the most asked-for cases first."""
    torch.set_num_threads(threads)
    report = Report("model", out)
    cases = [
        case
        for case in (_quick_cases() if quick else _all_cases())
        if any(word in case.model for word in only.split(",")) and str(case.batch) in batches.split(",")
    ]
    rows: dict[str, list[list[Cell]]] = {name: [] for name in COLUMNS}
    end = time.monotonic() + seconds
    with TemporaryDirectory() as folder:
        asked = list(dict.fromkeys([*engines.split(","), "eager"]))
        networks = _Networks(Path(folder), asked, device, precision.split(","))
        for number, case in enumerate(cases):
            if time.monotonic() > end:
                left = "; ".join(f"{one.model} {one.size} batch {one.batch}" for one in cases[number:])
                print(f"not run, since {seconds:g} seconds were over: {left}")
                break
            for name, new in _measure(case, networks, rounds=1 if quick else rounds, is_quick=quick).items():
                rows[name] += new
                report.table(TITLES[name], COLUMNS[name], rows[name])
            print(f"measured {case.model} {case.size} batch {case.batch}", flush=True)
    report.show()


def _quick_cases() -> list[Case]:
    return [Case(stored.name, "640x480", 1) for stored in bundled_models()]


def _all_cases() -> list[Case]:
    """In the order in which they are worth having."""
    small = [MOBILE, *(stored.name for stored in bundled_models())]
    return [
        *(Case(model, "640x480", 1) for model in (MASK, FASTER)),
        *(Case(model, "640x480", batch) for model in small for batch in (1, 4, 8)),
        *(Case(model, "1080p", 1) for model in (MASK, FASTER)),
        *(Case(model, size, batch) for size in SIZES for batch in (4, 8) for model in (MASK, FASTER)),
    ]


class _Networks:
    """Each network twice, with the same weights, loaded when it is first asked for.

    Args:
        folder: for a model store.
        engines: of our predictors.
        device: of both.
        precisions: of our predictors, except `eager` beside another engine, which has the first alone.
    """

    def __init__(self, folder: Path, engines: Sequence[str], device: str, precisions: Sequence[str]) -> None:
        self._folder = folder
        self._engines = engines
        self.device = device
        self._precisions = precisions
        self._loaded: dict[str, tuple[GeneralizedRCNN, dict[str, Predictor]]] = {}

    def load(self, model: str) -> tuple[GeneralizedRCNN, dict[str, Predictor]]:
        """torchvision's, and our predictors by engine, and by precision where there are several."""
        if model not in self._loaded:
            theirs, stored = self._bundled(model) if model in self._bundled_names() else self._random(model)
            ours: dict[str, Predictor] = {}
            for engine in self._engines:
                for precision in self._precisions[:1] if engine == "eager" else self._precisions:
                    version = quantised(stored) if precision == "int8" else stored
                    try:
                        predictor = our_predictor(version, engine, device=self.device, precision=precision)
                    except ModelStoreError as error:  # random weights may ask for more digits than a precision has
                        print(f"not measured: {error}", flush=True)
                        continue
                    name = predictor.info.engine
                    if len(self._precisions) > 1 and engine != "eager":
                        name = f"{name} {predictor.info.precision}"
                    ours[name] = predictor
            self._loaded[model] = theirs.to(self.device), ours
        return self._loaded[model]

    def _bundled_names(self) -> list[str]:
        return [stored.name for stored in bundled_models()]

    def _bundled(self, name: str) -> tuple[GeneralizedRCNN, StoredModel]:
        [stored] = [one for one in bundled_models() if one.name == name]
        return torchvision_twin(stored), stored

    def _random(self, builder: str) -> tuple[GeneralizedRCNN, StoredModel]:
        model = random_detector(builder, as_image(example_picture(*SIZES["640x480"])))
        return model, store_detector(model, builder, self._folder)


def _measure(case: Case, networks: _Networks, *, rounds: int, is_quick: bool) -> dict[str, list[list[Cell]]]:
    """The case's rows of each table, one for each engine."""
    theirs, predictors = networks.load(case.model)
    image = as_image(example_picture(*SIZES[case.size], name=picture_for(case.model)))
    found: list[int] = []  # by torchvision in the first picture, call by call
    stages: dict[str, list[Prediction]] = {engine: [] for engine in predictors}
    device, precision = networks.device, next(iter(predictors.values())).info.precision
    products, product_flop = matrix_products(
        256 if is_quick else SGEMM_SIDE, device=device, dtype=getattr(torch, precision)
    )
    sides: dict[str, Callable[[], object]] = {
        "torchvision": until_done(partial(_torchvision_call, theirs, image, case.batch, found, device), device)
    }
    for engine, predictor in predictors.items():
        sides[engine] = until_done(partial(_our_call, predictor, image, case.batch, stages[engine]), device)
    # 1. The operations and the memory, in calls that no clock runs for.
    flop = case.batch * count_flop(partial(_our_call, predictors["eager"], image, 1, []))
    memory = {name: megabytes(peak_memory_bytes(call, device)) for name, call in sides.items()}
    for engine in predictors:
        if engine.startswith("openvino"):
            let_compile(sides[engine])
    # 2. The times, in turn.
    timed_products = {f"product by {name}": product for name, product in products.items()}
    times = alternate(
        sides | timed_products,
        rounds=rounds,
        most_seconds=40,
        least_rounds=3 if case.batch == 1 else 1,
        warm_up=False,
    )
    rates = best_rates([times[name] for name in timed_products], product_flop)
    rows: dict[str, list[list[Cell]]] = {name: [] for name in COLUMNS}
    for engine in predictors:
        head: list[Cell] = [case.model, case.size, case.batch, engine]
        objects = f"{found[-1]}, {len(stages[engine][-1].detections)}"
        rows["calls"].append(
            [
                *head,
                objects,
                milliseconds(times["torchvision"]),
                milliseconds(times[engine]),
                ratio(times["torchvision"], times[engine]),
            ]
        )
        limits = [
            spread([100 * flop / rate / one for rate, one in zip(rates, times[side], strict=True)])
            for side in ("torchvision", engine)
        ]
        rows["limit"].append([*head, f"{flop / 1e9:.1f}", spread([rate / 1e9 for rate in rates]), *limits])
        timed = stages[engine][-len(times[engine]) :]
        rows["stages"].append([*head, *(stage_ms(timed, stage) for stage in STAGES)])
        rows["memory"].append([*head, memory["torchvision"], memory[engine]])
    return rows


def stage_ms(predictions: Sequence[Prediction], stage: str) -> Cell:
    """A batch that `graphs` replays has the one stage `graph`; one of another engine has the others."""
    seconds = [one.stage_seconds[stage] for one in predictions if stage in one.stage_seconds]
    return milliseconds(seconds) if seconds else "–"


def _torchvision_call(model: GeneralizedRCNN, image: Image, batch: int, found: list[int], device: str) -> None:
    with torch.inference_mode():
        detections = model([torchvision_input(image, device)] * batch)
    found.append(len(detections[0]["boxes"]))


def _our_call(predictor: Predictor, image: Image, batch: int, kept: list[Prediction]) -> None:
    kept.append(predictor.predict([Query(image)] * batch)[0])


if __name__ == "__main__":
    typer.run(main)
