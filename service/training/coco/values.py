"""Single values of a COCO file: numbers and ids in the forms that occur in practice."""

from __future__ import annotations

import math
from collections.abc import Iterable


def number_of(value: object) -> float | None:
    """A finite number, possibly written as a string; None for anything else, including booleans."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def whole_number_of(value: object) -> int | None:
    """A whole number above 0, possibly written as `640.0` or as a string; None for anything else."""
    number = number_of(value)
    return int(number) if number is not None and number > 0 and number.is_integer() else None


def id_of(value: object) -> str | None:
    """An id as a string for comparison: 7, 7.0 and "7" are the same id. None for anything but numbers and strings."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() else repr(value)
    return value.strip() if isinstance(value, str) else None


def sort_key(key: str) -> tuple[bool, int, str]:
    """Sort key: numbers by value, then strings alphabetically."""
    return (False, int(key), key) if _is_decimal(key) else (True, 0, key)


class Ids:
    """The ids of one table, for looking up references.

    Args:
        keys: of the table's rows, by `id_of`.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = frozenset(keys)
        # A reference 139 means the id "000000000139" if there is no 139 and no other candidate.
        self._padded: dict[int, str | None] = {}
        for key in self._keys:
            if _is_decimal(key):
                self._padded[int(key)] = None if int(key) in self._padded else key

    def find(self, reference: object) -> str | None:
        """The id that a reference means; None if there is none."""
        key = id_of(reference)
        if key is None or key in self._keys:
            return key
        return self._padded.get(int(key)) if _is_decimal(key) else None


def _is_decimal(key: str) -> bool:
    digits = key.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and len(digits) < 100
