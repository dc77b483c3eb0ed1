"""The directory of a TIFF file (EXIF uses the same structure): a list of tags, each with a type, a count and a value or
an offset. Classic TIFF has 32-bit offsets and entries of 12 bytes, BigTIFF 64-bit offsets and entries of 20.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from service.errors import InvalidImageError

MAX_ENTRIES = 4096

_HEADERS = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
_BYTES_OF_TYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
# Signed types and offsets too: decoders accept them where the format requires an unsigned number.
_INTEGER_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tag.

    Attributes:
        raw: the whole entry as stored in the file, 12 or 20 bytes.
        value_type: TIFF's type number; unknown types have no size.
        count: how many values.
        value_offset: where the values are in the file.
    """

    raw: bytes
    value_type: int
    count: int
    value_offset: int

    @property
    def value_bytes(self) -> int:
        """The size of all values in bytes."""
        return self.count * _BYTES_OF_TYPE.get(self.value_type, 0)


@dataclass(frozen=True, slots=True)
class Directory:
    """The first directory of a file.

    Attributes:
        data: the whole file.
        byte_order: `<` or `>`, as `struct` writes it.
        is_big: whether it is BigTIFF.
        entries: by tag; the first if a tag is repeated.
    """

    data: bytes
    byte_order: str
    is_big: bool
    entries: Mapping[int, Entry]

    def integers(self, tag: int) -> tuple[int, ...]:
        """All values of a tag, empty if it is missing or not of an integer type. Bound its count first.

        Raises:
            InvalidImageError: the values lie outside the file, or one is negative.
        """
        entry = self.entries.get(tag)
        return () if entry is None else self._first_integers(tag, entry, entry.count)

    def integer(self, tag: int) -> int | None:
        """The first value of a tag, whatever its count says; None if it is missing or not of an integer type.

        Raises:
            InvalidImageError: the value lies outside the file, or is negative.
        """
        entry = self.entries.get(tag)
        values = () if entry is None else self._first_integers(tag, entry, min(entry.count, 1))
        return values[0] if values else None

    def entry_of(self, tag: int, value: int) -> bytes:
        """An entry with one 32-bit value, as bytes."""
        if self.is_big:
            return struct.pack(f"{self.byte_order}HHQII", tag, 4, 1, value & 0xFFFFFFFF, 0)
        return struct.pack(f"{self.byte_order}HHII", tag, 4, 1, value & 0xFFFFFFFF)

    def _first_integers(self, tag: int, entry: Entry, count: int) -> tuple[int, ...]:
        if entry.value_type not in _INTEGER_TYPES:
            return ()
        kind = f"{self.byte_order}{count}{_INTEGER_TYPES[entry.value_type]}"
        if entry.value_offset + struct.calcsize(kind) > len(self.data):
            raise InvalidImageError(f"the values of TIFF tag {tag} lie outside the data")
        values = struct.unpack_from(kind, self.data, entry.value_offset)
        if min(values, default=0) < 0:
            raise InvalidImageError(f"a value of TIFF tag {tag} is negative")
        return values


def read_directory(data: bytes) -> Directory:
    """Read the first directory.

    Raises:
        InvalidImageError: not a TIFF header, or too many entries.
        struct.error: the data ends within the directory.
    """
    if data[:4] not in _HEADERS:
        raise InvalidImageError("the data do not begin with a TIFF header")
    byte_order, is_big = _HEADERS[data[:4]]
    position, count = _first(data, byte_order, is_big)
    if count > MAX_ENTRIES:
        raise InvalidImageError(f"a TIFF directory of {count} entries; we read up to {MAX_ENTRIES}")
    entry_bytes, layout = (20, "HHQQ") if is_big else (12, "HHII")
    entries: dict[int, Entry] = {}
    for start in range(position, position + count * entry_bytes, entry_bytes):
        tag, value_type, num_values, offset = struct.unpack_from(byte_order + layout, data, start)
        is_inline = num_values * _BYTES_OF_TYPE.get(value_type, 0) <= (8 if is_big else 4)
        value_offset = start + (12 if is_big else 8) if is_inline else offset
        entries.setdefault(tag, Entry(data[start : start + entry_bytes], value_type, num_values, value_offset))
    return Directory(data, byte_order, is_big, entries)


def _first(data: bytes, byte_order: str, is_big: bool) -> tuple[int, int]:
    """Where the entries of the first directory begin, and how many there are."""
    if is_big:
        (offset,) = struct.unpack_from(byte_order + "Q", data, 8)
        (count,) = struct.unpack_from(byte_order + "Q", data, offset)
        return offset + 8, count
    (offset,) = struct.unpack_from(byte_order + "I", data, 4)
    (count,) = struct.unpack_from(byte_order + "H", data, offset)
    return offset + 2, count
