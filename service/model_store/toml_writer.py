"""Writes readable TOML: values first, then tables; short lists on one line, long ones with one item per line. Existing
TOML writers put every number of a nested list such as `sizes = [[32], [64]]` on a separate line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date

_LINE_LENGTH = 120
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def write_toml(document: Mapping[str, object]) -> str:
    """The TOML text of a document.

    Args:
        document: values are str, bool, int, float, date or datetime, lists and tuples of these, and mappings (tables).
            None is left out, as TOML has no such value. A list must not hold a mapping.

    Raises:
        TypeError: on a value of any other type.
    """
    return "\n".join(_table_lines(document, path=())) + "\n"


def _table_lines(table: Mapping[str, object], path: tuple[str, ...]) -> list[str]:
    lines = [_key_value(key, value) for key, value in table.items() if not isinstance(value, Mapping | None)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            header = ".".join(_key(part) for part in (*path, key))
            lines += ["", f"[{header}]", *_table_lines(value, (*path, key))]
    return lines


def _key_value(key: str, value: object) -> str:
    line = f"{_key(key)} = {_value(value)}"
    if isinstance(value, list | tuple) and len(line) > _LINE_LENGTH:
        return f"{_key(key)} = [\n" + "".join(f"    {_value(item)},\n" for item in value) + "]"
    return line


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    raise TypeError(f"expected a value that TOML can hold, got {type(value).__name__}: {value!r}")


def _string(text: str) -> str:
    # A JSON string is a TOML basic string, except that TOML requires DEL to be escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
