"""`roiserve serve`: reads the settings, builds the app and runs it until it is told to stop. Mounted by `cli.py`.
Every setting is a flag; what it means stands in `service/settings.py` alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from service.settings import Settings, environment_variable


def serve_command() -> Callable[..., None]:
    """The command for typer: a flag for every setting, as text, since the settings themselves check what it says."""

    def serve(**flags: str | None) -> None:
        """Serve models over HTTP. Every flag may instead be set by the environment variable that its help names.

        Example: roiserve serve --port 9000 --models nuclei,blood-cells@1 --device cpu
        """
        settings = read_settings({name: value for name, value in flags.items() if value is not None})
        # Imported when they are needed, so that `roiserve --help` need not wait for them.
        from service.app import create_app
        from service.commands._server import serve_app
        from service.logs import configure_logging

        configure_logging(log_format=settings.log_format, log_level=settings.log_level)
        raise typer.Exit(serve_app(create_app(settings)))

    flags = [_flag(name, field) for name, field in Settings.model_fields.items()]
    serve.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]  # where typer looks for flags
    return serve


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    words = [environment_variable(name), *_range_words(field)]
    if field.default_factory is None and field.default not in (None, ()):
        words.append(f"default {field.default}")
    kind = {int: "INTEGER", float: "NUMBER"}.get(field.annotation, "TEXT")  # type: ignore[arg-type]
    option = typer.Option(_flag_name(name), help=f"{field.description} ({'; '.join(words)})", metavar=kind)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )


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
            typer.echo(f"roiserve: {places}: {problem['msg']}, got {problem['input']!r}", err=True)
        raise typer.Exit(2) from None
