"""`roiserve models verify`: whether a model computes on this machine what it should. Words and tables only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from service.commands._help import plain
from service.commands._options import (
    DEFAULT_STORE,
    DeviceOption,
    EngineCacheOption,
    EngineOption,
    PrecisionOption,
    StoreOption,
)

if TYPE_CHECKING:
    from service.structures import ModelInfo, Verification


@plain
def verify_model(
    model: Annotated[
        str, typer.Argument(metavar="NAME[@VERSION]", help="The model; without a version its default or highest.")
    ],
    store: StoreOption = DEFAULT_STORE,
    device: DeviceOption = "auto",
    engine: EngineOption = "auto",
    precision: PrecisionOption = "auto",
    engine_cache_dir: EngineCacheOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare a model's outputs with those of the engine eager in float32, on the same device.

    The server does the same whenever it loads a model. The status is 1 if the requested engine or precision does
    not pass.

    Example: roiserve models verify nuclei --engine openvino
    """
    from service.inference.loading import load_predictor
    from service.model_store.store import ModelStore

    predictor = load_predictor(
        ModelStore(store).find(model), device=device, precision=precision, engine=engine, cache_dir=engine_cache_dir
    )
    predictor.warm_up()
    if json:
        _print_json(predictor.info)
    else:
        _print_table(predictor.info)
    verification = predictor.info.verification
    if verification is not None and not verification.has_passed:
        raise typer.Exit(1)


def _print_json(info: ModelInfo) -> None:
    import orjson

    from service.api.schemas import verification_document

    used = {"model": info.key, "engine": info.engine, "precision": info.precision, "device": info.device}
    verification = None if info.verification is None else verification_document(info.verification)
    typer.echo(orjson.dumps(used | {"verification": verification}, option=orjson.OPT_INDENT_2))


def _print_table(info: ModelInfo) -> None:
    used = f"{info.key} on {info.device} is run by {info.engine} in {info.precision}"
    if info.verification is None:
        typer.echo(f"{used}, which is the reference for the others: its answers are finite")
        return
    _print_differences(info.verification)
    if info.verification.has_passed:
        typer.secho(f"passed: {used} ({info.verification.seconds:.1f} s)", fg="green")
    else:
        tried = f"{info.verification.engine} in {info.verification.precision}"
        typer.secho(f"{tried} does not pass; {used} instead", fg="red", err=True)


def _print_differences(verification: Verification) -> None:
    from rich.console import Console
    from rich.table import Table

    from service.structures import NOT_FINITE

    units = {"boxes": "px"}
    measure = "root mean square" if verification.precision == "int8" else "largest"
    table = Table("", f"{measure} difference", "tolerated", box=None, header_style="bold", pad_edge=False)
    for name, value in verification.values.items():
        found = "not finite" if value.difference == NOT_FINITE else f"{value.difference:.2g}"
        table.add_row(name, f"{found} {units.get(name, '')}", f"{value.tolerance:g} {units.get(name, '')}")
    Console().print(table)
