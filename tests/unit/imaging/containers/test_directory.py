"""Directories of TIFF files, written by hand."""

from __future__ import annotations

import struct

import pytest

from service.errors import InvalidImageError
from service.imaging.containers.directory import read_directory


def test_values_stand_in_the_entry_when_they_fit_and_elsewhere_when_not() -> None:
    entries = struct.pack("<HHIHH", 1, 3, 2, 10, 20) + struct.pack("<HHII", 2, 3, 3, 8)
    data = b"II*\0" + struct.pack("<I", 14) + struct.pack("<HHH", 7, 8, 9) + struct.pack("<H", 2) + entries
    directory = read_directory(data)
    assert directory.integers(1) == (10, 20)
    assert directory.integers(2) == (7, 8, 9)
    assert directory.integers(3) == ()


def test_bigtiff_has_wider_counts_and_offsets() -> None:
    entry = struct.pack(">HHQHHHH", 1, 3, 4, 1, 2, 3, 4)
    data = b"MM\0+" + struct.pack(">HHQ", 8, 0, 16) + struct.pack(">Q", 1) + entry
    assert read_directory(data).integers(1) == (1, 2, 3, 4)


def test_of_a_repeated_tag_the_first_counts() -> None:
    entries = struct.pack("<HHII", 1, 4, 1, 5) + struct.pack("<HHII", 1, 4, 1, 6)
    assert read_directory(b"II*\0" + struct.pack("<IH", 8, 2) + entries).integers(1) == (5,)


def test_more_entries_than_any_file_needs_are_refused() -> None:
    with pytest.raises(InvalidImageError, match="5000 entries"):
        read_directory(b"II*\0" + struct.pack("<IH", 8, 5000) + bytes(5000 * 12))


def test_values_outside_the_data_are_refused() -> None:
    directory = read_directory(b"II*\0" + struct.pack("<IHHHII", 8, 1, 1, 4, 1000, 0))
    with pytest.raises(InvalidImageError, match="tag 1 lie outside"):
        directory.integers(1)
