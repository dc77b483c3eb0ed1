"""Help in plain words: says what to write where typer would show a Python type (`<list[Path]>`, `<bool>`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from typer.models import ParameterInfo

Command = TypeVar("Command", bound=Callable[..., Any])
_WORDS = {bool: "", Path: "PATH", int: "NUMBER", float: "NUMBER", str: "TEXT"}


def plain(command: Command) -> Command:
    """The same command; options without a metavar get one in plain words, switches an empty one."""
    hints = get_type_hints(command, include_extras=True)
    for hint in hints.values():
        if get_origin(hint) is Annotated:
            kind, *infos = get_args(hint)
            for info in infos:
                if isinstance(info, ParameterInfo) and info.metavar is None:
                    info.metavar = metavar(kind)
    # Stored evaluated: from annotations as text, typer would make new options without these metavars.
    command.__annotations__ = hints
    return command


def metavar(kind: Any) -> str:
    """What the help shows in place of a value of this type."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin in (Union, UnionType):
        return metavar(next(part for part in parts if part is not NoneType))
    return metavar(parts[0]) if origin in (list, tuple) else _WORDS.get(kind, "VALUE")
