"""`roiserve evaluate`: COCO's average precision of a stored model on a data set. Words and tables only; the
figures are `service/training/evaluation.py`'s.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from service.commands._data import AnnotatedOption, DropOption, LabelsOption, chosen_labels, load_with_words
from service.commands._options import (
    DEFAULT_STORE,
    DeviceOption,
    EngineCacheOption,
    EngineOption,
    PrecisionOption,
    StoreOption,
)

if TYPE_CHECKING:
    from service.structures import ModelInfo
    from service.training.evaluation import Evaluation


def evaluate(
    model: Annotated[
        str, typer.Option(metavar="NAME[@VERSION]", help="The model; without a version its default or highest.")
    ],
    data: Annotated[Path, typer.Option(help="COCO-format annotation file, such as DIR/val.json.")],
    store: StoreOption = DEFAULT_STORE,
    device: DeviceOption = "auto",
    engine: EngineOption = "auto",
    precision: PrecisionOption = "auto",
    engine_cache_dir: EngineCacheOption = None,
    batch_policy: Annotated[
        Literal["exact", "bucketed"],
        typer.Option(help="How pictures are padded: as little as possible, or as a server with this policy does."),
    ] = "exact",
    max_detections: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Detections of an image that count; the model's limit if unset.")
    ] = None,
    labels: LabelsOption = None,
    drop_bad_annotations: DropOption = False,
    annotated: AnnotatedOption = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print COCO AP, AP50, AP75 and AP by size of a model, in percent, for boxes and masks; JSON has them from 0 to 1.

    Example: roiserve evaluate --model nuclei --data cells/val.json
    """
    import orjson
    from rich.console import Console
    from rich.progress import Progress

    from service.inference.loading import load_predictor
    from service.model_store.store import ModelStore
    from service.training.evaluation import evaluate as evaluate_predictor

    predictor = load_predictor(
        ModelStore(store).find(model),
        device=device,
        precision=precision,
        engine=engine,
        cache_dir=engine_cache_dir,
        searching=True,
        buckets=() if batch_policy == "bucketed" else None,
    )
    info = predictor.info
    dataset = load_with_words(
        data,
        labels=chosen_labels(labels) or info.labels,
        leaves_out_others=labels is not None,
        masks="if_any" if info.has_masks else "none",
        drop_bad=drop_bad_annotations,
        frame=annotated,
    )
    if info.has_masks and not dataset.has_masks:
        typer.echo("  note: the data have no masks, so only boxes are evaluated", err=True)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(info.key, total=len(dataset))
        evaluation = evaluate_predictor(
            predictor, dataset, max_detections=max_detections, advance=lambda: progress.advance(task)
        )
    if json:
        run: dict[str, object] = {
            "model": info.key,
            "engine": info.engine,
            "precision": info.precision,
            "batch_policy": batch_policy,
            "data": str(data),
        }
        run["data_findings"] = dataset.report.lines()
        typer.echo(orjson.dumps({**run, **asdict(evaluation)}, option=orjson.OPT_INDENT_2))
    else:
        _print_table(info, evaluation, batch_policy)


def _print_table(info: ModelInfo, evaluation: Evaluation, batch_policy: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from service.training.figures import FIGURES, NOTE, percent

    padding = ", padded to buckets" if batch_policy == "bucketed" else ""
    title = (
        f"{info.key} by {info.engine} in {info.precision}{padding}, {evaluation.num_images} pictures, "
        f"at most {evaluation.max_detections} detections each"
    )
    table = Table("", *FIGURES.values(), title=title, title_justify="left", box=None, pad_edge=False)
    for kind, figures in evaluation.rows():
        table.add_row(kind, *(percent(getattr(figures, name)) for name in FIGURES))
        if len(figures.ap_by_label) > 1:
            for label, ap in figures.ap_by_label.items():
                table.add_row(f"  {label}", percent(ap), percent(figures.ap50_by_label[label]))
    table.caption, table.caption_justify = NOTE, "left"
    Console().print(table)
