"""Options and messages shared by the commands that read data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from service.training.coco.annotations import Masks
    from service.training.dataset import CocoDataset

LabelsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--labels",
        metavar="NAME,NAME,…",
        help="Only these of the data's categories; annotations of others are left out. May be given several times.",
    ),
]
DropOption = Annotated[bool, typer.Option(help="Leave bad annotations out instead of refusing.")]
AnnotatedOption = Annotated[
    Literal["auto", "upright", "stored"],
    typer.Option(
        help="What the annotations of pictures that EXIF turns refer to, where no size tells: the picture as it is "
        "shown or as it is stored."
    ),
]


def chosen_labels(given: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names after `--labels`, each once; None if there are none.

    Raises:
        typer.BadParameter: the option names nothing.
    """
    if not given:
        return None
    names = tuple(dict.fromkeys(name.strip() for text in given for name in text.split(",") if name.strip()))
    if not names:
        raise typer.BadParameter("expected names of categories, got none", param_hint="--labels")
    return names


def load_with_words(
    path: Path,
    *,
    labels: Sequence[str] | None,
    leaves_out_others: bool,
    masks: Masks,
    drop_bad: bool,
    frame: Literal["auto", "upright", "stored"],
) -> CocoDataset:
    """Read and check a data set; print on stderr the progress, a summary, and what was repaired or left out."""
    from rich.console import Console
    from rich.progress import Progress

    from service.training.dataset import load_coco

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(f"checking {path.name}", total=None)
        dataset = load_coco(
            path,
            labels=labels,
            leaves_out_others=leaves_out_others,
            masks=masks,
            drop_bad=drop_bad,
            frame=frame,
            start=lambda pictures: progress.update(task, total=pictures),
            advance=lambda: progress.advance(task),
        )
    typer.echo(f"{path}: {dataset.summary()}", err=True)
    for line in dataset.report.lines():
        typer.echo(f"  {line}", err=True)
    return dataset
