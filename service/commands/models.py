"""`roiserve models`: what is in a model store, and how models get into it. Mounted by `cli.py`. Only words and tables
here; the work is done by `service/model_store`, imported when a command runs, so that `--help` need not wait for torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from service.model_store.store import StoredModel

models_app = typer.Typer(
    name="models", no_args_is_help=True, help="List, show, import and download the models of a model store."
)

StoreOption = Annotated[
    Path,
    typer.Option("--store", envvar="ROISERVE_MODEL_STORE", help="Folder that holds <name>/<version>/model.toml."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DEFAULT_STORE = Path("model_store")


@models_app.command("list")
def list_models(store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """List the models of a store, broken ones with what is wrong with them.

    Example: roiserve models list --store /srv/models
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from service.model_store.store import ModelStore

    model_store = ModelStore(store)
    summaries = [_summary(model) for model in model_store.list()]
    if json:
        typer.echo(_json(summaries))
        return
    columns = ("model", "architecture", "backbone", "roi_op", "labels", "megabytes")
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for summary in summaries:
        table.add_row(*(escape(_cell(summary[column])) for column in columns))
    Console().print(table)
    # Below the table and in full: they name files, keys and what was expected.
    broken = [f"{summary['model']} is broken: {summary['problem']}" for summary in summaries if summary["problem"]]
    for line in [*broken, *model_store.misplaced()]:
        typer.secho(line, fg="red", err=True)


@models_app.command("show")
def show_model(
    model: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="The model; without a version its highest.")],
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
    console.print(f"[bold]{stored.key}[/bold] in {stored.path} ({size / 1e6:.1f} MB of weights)\n")
    text = (stored.path / MODEL_TOML).read_text(encoding="utf-8")
    console.print(Syntax(text, "toml", theme="ansi_dark", background_color="default", word_wrap=True))


def _summary(stored: StoredModel) -> dict[str, object]:
    """What there is to say of a model in a line; all but its name is None where the folder is broken."""
    problem = stored.problem
    summary: dict[str, object] = {"model": stored.key, "name": stored.name, "version": stored.version}
    summary |= dict.fromkeys(("architecture", "backbone", "roi_op", "labels", "megabytes"))
    if problem is None:
        model_toml = stored.model_toml
        summary |= {
            "architecture": model_toml.architecture,
            "backbone": model_toml.backbone.name,
            "roi_op": model_toml.roi.op,
            "labels": len(model_toml.labels),
            "megabytes": round(stored.weights_path.stat().st_size / 1e6, 1),
        }
    return summary | {"path": str(stored.path), "problem": problem}


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def _json(value: object) -> str:
    import orjson

    return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()
