"""`roiserve models`: what is in a model store, and how models get into it. Only words and tables here; the work is done
by `service/model_store`, imported when a command runs, so that `--help` need not wait for torch.
"""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from service.commands._help import plain
from service.commands._options import DEFAULT_STORE, StoreOption
from service.commands.verify import verify_model
from service.model_store.model_toml import Dtype, ProvenanceTable

if TYPE_CHECKING:
    from service.model_store.importing import ImportedModel
    from service.model_store.store import StoredModel

InputFormat = Literal["rgb", "bgr"]

models_app = typer.Typer(
    name="models", no_args_is_help=True, help="List, show, import and download the models of a model store."
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_MAX_PIXELS = 500_000_000


@models_app.command("list")
@plain
def list_models(store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """List the models of a store, broken ones with what is wrong with them.

    Example: roiserve models list --store /srv/models
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from service.model_store.store import ModelStore

    model_store = ModelStore(store)
    defaults = {model.key for model in model_store.defaults()}
    summaries = [_summary(model) | {"is_default": model.key in defaults} for model in model_store.list()]
    if json:
        typer.echo(_json(summaries))
        return
    columns = ("model", "architecture", "backbone", "roi_op", "labels", "megabytes")
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    # A column more would not fit in a terminal of 80.
    is_marked = len(defaults) < len(summaries)
    for summary in summaries:
        model, *others = (escape(_cell(summary[column])) for column in columns)
        table.add_row(f"{model} *" if is_marked and summary["is_default"] else model, *others)
    Console().print(table)
    if is_marked:
        typer.echo("* what the name alone stands for")
    # Below the table and in full: they name files, keys and what was expected.
    broken = [f"{summary['model']} is broken: {summary['problem']}" for summary in summaries if summary["problem"]]
    for line in [*broken, *model_store.misplaced()]:
        typer.secho(line, fg="red", err=True)


@models_app.command("show")
@plain
def show_model(
    model: Annotated[
        str, typer.Argument(metavar="NAME[@VERSION]", help="The model; without a version its default or highest.")
    ],
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Show all that a model's folder says about it.

    Example: roiserve models show nuclei
    """
    from rich.console import Console
    from rich.syntax import Syntax

    from service.model_store.model_toml import MODEL_TOML
    from service.model_store.store import ModelStore

    stored = ModelStore(store).find(model)
    if json:
        typer.echo(_json({**_summary(stored), "model_toml": stored.model_toml.model_dump(mode="json")}))
        return
    size = stored.weights_path.stat().st_size
    console = Console()
    console.print(f"[bold]{stored.key}[/bold] in {stored.path} ({size / 1e6:.1f} MB of weights)\n", soft_wrap=True)
    text = (stored.path / MODEL_TOML).read_text(encoding="utf-8")
    console.print(Syntax(text, "toml", theme="ansi_dark", background_color="default", word_wrap=True))


@models_app.command("import")
@plain
def import_model(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="A .pth, .safetensors or detectron2's .pkl file, or the index.json of several shards.",
        ),
    ],
    name: Annotated[str, typer.Option("--name", help="What to call it: a-z, 0-9, '.', '_' and '-'.")],
    architecture: Annotated[
        str | None,
        typer.Option(
            "--architecture",
            metavar="BUILDER",
            help="torchvision's name of the network, such as maskrcnn_resnet50_fpn_v2; left out, the weights tell it.",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="FILE",
            help="The class names: one on each line, or JSON, YAML or a COCO file; background left out.",
        ),
    ] = None,
    model_config: Annotated[
        Path | None,
        typer.Option(
            "--model-config",
            metavar="FILE",
            help="What the weights do not tell, as model.toml says it: some keys of it, or the whole network.",
        ),
    ] = None,
    norm_eps: Annotated[
        float | None,
        typer.Option(
            "--norm-eps",
            min=0,
            help="Epsilon of the backbone's batch norms: 0 for what was fine-tuned from torchvision's published "
            "fasterrcnn_resnet50_fpn or maskrcnn_resnet50_fpn, else 1e-5, the default.",
        ),
    ] = None,
    input_format: Annotated[
        InputFormat | None,
        typer.Option(
            "--input-format",
            help="The order in which the first convolution reads the colours; left out, as the file says or its "
            "family has it: rgb for torchvision and mmdetection, bgr for detectron2.",
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check",
            metavar="PICTURE",
            exists=True,
            dir_okay=False,
            help="Store the model only if it finds in this picture what --expect says.",
        ),
    ] = None,
    expect: Annotated[
        Path | None,
        typer.Option(
            "--expect",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="JSON of what torchvision, detectron2 or mmdetection has found in the picture of --check.",
        ),
    ] = None,
    averaged: Annotated[
        bool,
        typer.Option(
            "--averaged",
            help="Take the weights averaged over training (model_ema) that the file has beside the others.",
        ),
    ] = False,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="How weights are stored; half precision halves the file.")
    ] = "float32",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Bring a checkpoint of torchvision, detectron2 or mmdetection into a store. Nothing in the file is run.

    Says what the weights do not tell and what was assumed for it.

    Example: roiserve models import best.pth --name parts --architecture fasterrcnn_resnet50_fpn --labels parts.txt
    """
    from service.model_store.importing import find_same, import_checkpoint, store_imported
    from service.model_store.labels import read_labels
    from service.model_store.model_toml import read_network_tables
    from service.model_store.store import ModelStore, check_name

    check_name(name, "1")
    if (check is None) != (expect is None):
        raise typer.BadParameter("--check and --expect go together: a picture, and what was found in it")
    given = read_network_tables(model_config) if model_config else {}
    if architecture is not None and "backbone" in given:
        raise typer.BadParameter("describes the network: give nothing else", param_hint="--model-config")
    imported = import_checkpoint(
        file,
        labels=read_labels(labels) if labels else None,
        architecture=architecture,
        given=given,
        norm_eps=norm_eps,
        averaged=averaged,
        input_format=input_format,
    )
    if check is not None and expect is not None and not _answers_alike(imported, check, expect):
        _tell_findings(imported)
        raise typer.Exit(1)
    model_store = ModelStore(store)
    if same := find_same(model_store, imported, name=name, dtype=dtype):
        typer.echo(f"{same.key} has these weights and settings already, in {same.path}: nothing was stored")
        return
    provenance = ProvenanceTable(command=_command_line(), created=datetime.now(UTC).replace(microsecond=0))
    stored = store_imported(model_store, imported, name=name, provenance=provenance, source=file.name, dtype=dtype)
    _tell_stored(stored)
    _tell_findings(imported)


def _tell_findings(imported: ImportedModel) -> None:
    """What else its owner should know, and every setting that decides the answers, with where it is from."""
    for note in imported.notes:
        typer.echo(f"note: {note}")
    rows = [("setting", "value", "from"), *imported.rows]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, source in rows:
        typer.echo(f"  {key:{widths[0]}}  {value:{widths[1]}}  {source}")
    if any(source.startswith("assumed") for _, _, source in imported.rows):
        typer.echo("No weight tells what is assumed: give what differs in a --model-config, and prove it with --check.")


def _answers_alike(imported: ImportedModel, picture: Path, expected: Path) -> bool:
    """Compare with the source's own answer, and tell how far they agree."""
    from service.imaging.decode import ImageLimits, decode_image
    from service.model_store.checking import answer_of, compare, read_answer, told

    pixels = decode_image(picture.read_bytes(), limits=ImageLimits(max_image_pixels=_MAX_PIXELS)).pixels
    comparison = compare(read_answer(expected), answer_of(imported, pixels))
    for line in told(comparison):
        typer.secho(line, fg=None if comparison.agrees else "red", err=not comparison.agrees)
    return comparison.agrees


@models_app.command("pull")
@plain
def pull(
    architecture: Annotated[str, typer.Argument(metavar="NAME", help="torchvision's name of the network.")],
    name: Annotated[str | None, typer.Option("--name", help="What to call it; left out, the same.")] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            "--base-url",
            envvar="ROISERVE_WEIGHTS_BASE_URL",
            help="A mirror that has torchvision's files by their names; left out, torchvision's own place.",
        ),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Download a detector that torchvision has trained on COCO; an unfinished download is continued.

    NAME is fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2, fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_mobilenet_v3_large_320_fpn, maskrcnn_resnet50_fpn or maskrcnn_resnet50_fpn_v2.

    Example: roiserve models pull maskrcnn_resnet50_fpn_v2
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from service.model_store.published import published_weights
    from service.model_store.pull import find_pulled, pull_model
    from service.model_store.store import ModelStore

    weights, model_store, name = published_weights(architecture), ModelStore(store), name or architecture
    if pulled := find_pulled(model_store, weights, name=name):
        typer.echo(f"{pulled.key} has these weights already, in {pulled.path}")
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(weights.file_name)
        stored = pull_model(
            model_store,
            weights,
            name=name,
            base_url=base_url,
            command=_command_line(),
            on_progress=lambda present, total: progress.update(task, completed=present, total=total),
        )
    _tell_stored(stored)


models_app.command("verify")(plain(verify_model))


def _tell_stored(stored: StoredModel) -> None:
    model_toml = stored.model_toml
    labels = f"{len(model_toml.labels)} label{'' if len(model_toml.labels) == 1 else 's'}"
    typer.echo(
        f"stored {stored.key} in {stored.path}: {model_toml.architecture} on {model_toml.backbone.name}, {labels}"
    )


def _command_line() -> str:
    return shlex.join(["roiserve", *sys.argv[1:]])


def _summary(stored: StoredModel) -> dict[str, object]:
    """What there is to say of a model in a line; all but its name is None where the folder is broken."""
    problem = stored.problem
    summary: dict[str, object] = {"model": stored.key, "name": stored.name, "version": stored.version}
    summary |= dict.fromkeys(("architecture", "backbone", "roi_op", "labels", "megabytes", "precision"))
    if problem is None:
        model_toml = stored.model_toml
        summary |= {
            "architecture": model_toml.architecture,
            "backbone": model_toml.backbone.name,
            "roi_op": model_toml.roi.op,
            "labels": len(model_toml.labels),
            "megabytes": round(stored.weights_path.stat().st_size / 1e6, 1),
            "precision": "float32" if model_toml.int8 is None else "int8",
        }
    return summary | {"path": str(stored.path), "problem": problem}


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def _json(value: object) -> str:
    import orjson

    return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()
