"""`roiserve quantize`: a version of a stored model that runs in int8 on the CPU. Words and progress bars only; the work
is done by `service/training/quantization`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands._data import AnnotatedOption, DropOption, load_with_words
from service.commands._options import DEFAULT_STORE, StoreOption
from service.errors import DatasetError

if TYPE_CHECKING:
    from service.training.quantization.run import Written


def quantize(
    model: Annotated[str, typer.Option(metavar="NAME[@VERSION]", help="The model, in float32.")],
    data: Annotated[Path, typer.Option(help="COCO-format annotation file whose pictures calibrate: DIR/train.json.")],
    val: Annotated[
        Path | None, typer.Option(help="COCO-format file to measure AP on; val.json beside --data if unset.")
    ] = None,
    max_ap_loss: Annotated[
        float, typer.Option(min=0, help="Points of AP (of 100) that int8 may lose, by boxes or masks.")
    ] = 0.3,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures to calibrate on, at most.")] = 300,
    store: StoreOption = DEFAULT_STORE,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: one a core.")] = 0,
    drop_bad_annotations: DropOption = False,
    annotated: AnnotatedOption = "auto",
) -> None:
    """Write the next version of a model, quantised to int8 for the CPU, if it keeps its AP.

    Layers go back to float32 until the loss is within the bound; if none can stay in int8, nothing is written. An
    interrupted run resumes when the same command is given again.

    Example: roiserve quantize --model nuclei --data cells/train.json
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from service.model_store.store import ModelStore
    from service.training.quantization.proposing import check_installed
    from service.training.quantization.run import Run, run_folder
    from service.training.quantization.workbench import check_quantizable
    from service.training.run_folder import locked

    if threads:
        torch.set_num_threads(threads)
    model_store = ModelStore(store)
    stored = model_store.find(model)
    # Before every picture is decoded, which can take minutes.
    check_quantizable(stored)
    check_installed()
    config = stored.model_toml
    train_set, val_set = (
        load_with_words(
            path,
            labels=config.labels,
            leaves_out_others=False,
            masks="if_any" if config.has_masks else "none",
            drop_bad=drop_bad_annotations,
            frame=annotated,
        )
        for path in (data, val or data.with_name("val.json"))
    )
    if not sum(val_set.counts().values()):
        raise DatasetError(f"{val_set.path}: expected at least one object to measure AP on, got none")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn())
    with (
        locked(run_folder(model_store, stored)),
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress,
    ):

        def stage(name: str, steps: int) -> Callable[[], None]:
            for old in progress.task_ids:
                progress.remove_task(old)
            task = progress.add_task(name, total=steps)
            return lambda: progress.advance(task)

        run = Run(
            model_store,
            stored,
            train=train_set,
            val=val_set,
            pictures=pictures,
            stage=stage,
            say=lambda line: console.print(line, soft_wrap=True, highlight=False),
        )
        if run.state.was_begun:
            console.print(f"resuming an earlier run, from {run.state.folder}", soft_wrap=True)
        try:
            written = run.write(max_ap_loss=max_ap_loss, command=shlex.join(["roiserve", *sys.argv[1:]]))
        except KeyboardInterrupt:
            typer.echo(f"stopped; the same command resumes from {run.state.folder}", err=True)
            raise typer.Exit(130) from None
    _print_result(written)


def _print_result(written: Written) -> None:
    from rich.console import Console
    from rich.table import Table

    kinds = list(written.ap["float32"])
    table = Table("AP, percent", *kinds, box=None, header_style="bold", pad_edge=False)
    for precision, ap in written.ap.items():
        table.add_row(precision, *(f"{100 * ap[kind]:.2f}" for kind in kinds))
    Console().print(table)
    stored = written.stored
    megabytes = sum(file.stat().st_size for file in stored.path.iterdir()) / 1e6
    typer.echo(f"{stored.key} is in {stored.path} ({megabytes:.1f} MB)")
