"""`roiserve serve`: reads the settings, builds the app and runs it until it is told to stop. Every setting is a flag;
what it means is said in `service/settings.py` alone.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from service.settings import Settings, environment_variable, service_links, unknown_variables

logger = logging.getLogger(__name__)

# The help shows the settings in their order, under these headings: each from the one that is named here.
_PANELS = {
    "host": "Address",
    "model_store": "Models",
    "device": "Device",
    "max_batch_size": "Batches and queue",
    "allow_roi_op_override": "Requests",
    "api_keys": "Keys",
    "drain_delay_seconds": "Stopping",
    "otlp_endpoint": "Traces and log",
}
_METAVARS = {"_seconds": "SECONDS", "_ms": "MILLISECONDS", "_bytes": "BYTES", "_pixels": "PIXELS", "_dir": "DIR"}


def serve_command() -> Callable[..., None]:
    """The command for typer: a flag for every setting, as text, since the settings themselves check what it says."""

    def serve(**flags: str | None) -> None:
        """Serve models over HTTP. Every flag may instead be set by the environment variable that its help names.

        Example: roiserve serve --port 9000 --models nuclei,blood-cells@1 --device cpu
        """
        settings = read_settings({name: value for name, value in flags.items() if value is not None})
        # Imported when they are needed, so that `roiserve --help` need not wait for them.
        from service.commands._preflight import check_address, check_models
        from service.logs import configure_logging

        check_address(settings.host, settings.port)
        if settings.admin_port is not None:
            check_address(settings.host, settings.admin_port, flag="--admin-port")
        check_models(settings)
        configure_logging(log_format=settings.log_format, log_level=settings.log_level)
        _tell_of_variables()
        from service.app import create_app
        from service.commands._server import serve_app

        raise typer.Exit(serve_app(create_app(settings)))

    panel, flags = "", []
    for name, field in Settings.model_fields.items():
        panel = _PANELS.get(name, panel)
        flags.append(_flag(name, field, panel))
    serve.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]  # where typer looks for flags
    return serve


def _tell_of_variables() -> None:
    """Log which variables look like settings and are none."""
    if links := service_links(os.environ):
        logger.info("ignored what Kubernetes sets for a Service", extra={"fields": {"variables": ", ".join(links)}})
    for name, meant in unknown_variables(os.environ):
        hint = {"did_you_mean": meant} if meant else {}
        logger.warning("unknown variable", extra={"fields": {"variable": name, **hint}})


def _flag(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    words = [environment_variable(name), *_range_words(field)]
    if field.default_factory is None and field.default not in (None, (), ""):
        words.append(f"default {_written(field.default)}")
    names = [_flag_name(name), "--store"] if name == "model_store" else [_flag_name(name)]
    option = typer.Option(
        *names,
        help=f"{field.description} ({'; '.join(words)})",
        metavar=_metavar(name, field),
        autocompletion=_completion(field),
        rich_help_panel=panel,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )


def _written(default: object) -> str:
    """As one writes it in a flag."""
    return str(default).lower() if isinstance(default, bool) else str(default)


def _metavar(name: str, field: FieldInfo) -> str:
    """What the help shows in the place of the value: the choices, the unit or the kind of thing."""
    kind = field.annotation
    if choices := _choices(field):
        return "|".join(choices)
    if unit := next((unit for suffix, unit in _METAVARS.items() if name.endswith(suffix)), None):
        return unit
    kinds = {kind} if get_origin(kind) not in (UnionType, tuple) else set(get_args(kind))
    if Path in kinds:
        return "FILE" if name.endswith("_file") else "DIR"
    if SecretStr in kinds:
        return "KEY,…"
    return "NUMBER" if kinds & {int, float} else "NAME,…" if get_origin(kind) is tuple else "TEXT"


def _choices(field: FieldInfo) -> tuple[str, ...]:
    if field.annotation is bool:
        return ("true", "false")
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def _completion(field: FieldInfo) -> Callable[[str], list[str]] | None:
    """What a shell offers for a flag's value."""
    choices = _choices(field)
    return (lambda incomplete: [one for one in choices if one.startswith(incomplete)]) if choices else None


def _flag_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _range_words(field: FieldInfo) -> Iterator[str]:
    for words, bound in (("at least", "ge"), ("above", "gt"), ("at most", "le")):
        for metadata in field.metadata:
            if (value := getattr(metadata, bound, None)) is not None:
                yield f"{words} {value}"


def read_settings(flags: dict[str, Any]) -> Settings:
    """Flags over environment over defaults. What is wrong is said by name and ends the program with status 2."""
    try:
        return Settings(**flags)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0])
            places = f"{_flag_name(name)} or {environment_variable(name)}"
            # What may be secret is not repeated: what is printed ends in logs.
            came = "" if name in ("api_keys", "admin_keys", "label_studio_url") else f", got {problem['input']!r}"
            typer.echo(f"roiserve: {places}: {problem['msg']}{came}", err=True)
        raise typer.Exit(2) from None
