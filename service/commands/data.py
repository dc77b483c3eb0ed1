"""`roiserve data`: look a data set over without training, and convert those of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from service.commands._data import AnnotatedOption, DropOption, LabelsOption, chosen_labels, load_with_words
from service.errors import DatasetError

if TYPE_CHECKING:
    from service.training.dataset import CocoDataset

data_app = typer.Typer(help="Check data sets, and convert those of other tools.", no_args_is_help=True)


@data_app.command()
def check(
    source: Annotated[Path, typer.Argument(metavar="DIR|FILE", help="A COCO annotation file, or a folder of them.")],
    sheet: Annotated[
        Path | None, typer.Option(help="Draw some pictures with their annotations into this PNG or JPEG file.")
    ] = None,
    labels: LabelsOption = None,
    drop_bad_annotations: DropOption = False,
    annotated: AnnotatedOption = "auto",
) -> None:
    """Report what training and evaluation would make of a data set; status 1 if they would refuse it.

    Example: roiserve data check cells --sheet cells.jpg
    """
    from service.training.contact_sheet import draw_sheet, write_sheet
    from service.training.conversion.sources import coco_files, layout_of

    if (layout := layout_of(source)) != "coco":
        raise DatasetError(
            f"{source}: is in the layout of {layout}; `roiserve data convert {source} DEST` makes it ours"
        )
    datasets: list[CocoDataset] = []
    refusals: list[str] = []
    # What training reads by its name counts, though it may not look like COCO's.
    ours = {split: path for split in ("train", "val") if (path := source / f"{split}.json").is_file()}
    for path in (ours | coco_files(source)).values():
        try:
            names = chosen_labels(labels)
            datasets.append(
                load_with_words(
                    path,
                    labels=names,
                    leaves_out_others=names is not None,
                    masks="if_any",
                    drop_bad=drop_bad_annotations,
                    frame=annotated,
                )
            )
        except DatasetError as error:
            refusals.append(str(error))
    for line in _notes_on_splits(datasets):
        typer.echo(f"  note: {line}", err=True)
    if sheet is not None and datasets:
        write_sheet(draw_sheet(datasets), sheet)
        typer.echo(f"{sheet} shows some of the pictures", err=True)
    if refusals:
        raise DatasetError("\n".join(refusals))
    typer.echo(f"{source}: no problems")


@data_app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="The data set: a folder, or CVAT's or COCO's file.")],
    dest: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    layout: Annotated[
        Literal["auto", "coco", "yolo", "voc", "labelme", "cvat"], typer.Option(help="Of the source; auto finds out.")
    ] = "auto",
    val_share: Annotated[
        float, typer.Option(min=0, max=0.9, help="Part of the pictures for validation, where the source has no splits.")
    ] = 0.2,
    link: Annotated[bool, typer.Option("--link", help="Link to the pictures instead of copying them.")] = False,
) -> None:
    """Write train.json, val.json and images/ from YOLO, Pascal VOC, LabelMe, CVAT or COCO files in any folders.

    Example: roiserve data convert yolo-cells cells
    """
    from service.training.conversion.coco_source import read_coco_source
    from service.training.conversion.scene import split_up, write_scenes
    from service.training.conversion.sources import layout_of, read_source

    known = layout_of(source) if layout == "auto" else layout
    scenes, names = read_coco_source(source) if known == "coco" else read_source(source, known)
    split_up(scenes, val_share=val_share)
    counts = write_scenes(scenes, names, dest, links=link)
    parts = ", ".join(f"{count} {split}" for split, count in counts.items())
    typer.echo(f"{dest}: {parts} pictures from {known}, categories: {', '.join(names)}")
    for split in counts:
        load_with_words(
            dest / f"{split}.json", labels=None, leaves_out_others=False, masks="if_any", drop_bad=False, frame="auto"
        )


def _notes_on_splits(datasets: list[CocoDataset]) -> list[str]:
    """What only several splits together show."""
    notes = []
    for place, one in enumerate(datasets):
        for other in datasets[place + 1 :]:
            shared = {sample.digest for sample in one.samples} & {sample.digest for sample in other.samples}
            if shared:
                notes.append(f"{len(shared)} pictures are in both {one.path.name} and {other.path.name}")
            if one.labels != other.labels:
                notes.append(f"{one.path.name} and {other.path.name} have other categories, or in another order")
    return notes
