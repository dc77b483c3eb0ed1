"""What is sent, and in which order."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from service.errors import InvalidRequestError
from service.load.pictures import endless, read_pictures


def test_pictures_below_a_folder_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.JPG").write_bytes(b"any bytes")
    (tmp_path / "a.png").write_bytes(b"others")
    (tmp_path / "notes.txt").write_text("no picture")
    found = [(one.name, one.content_type, one.data) for one in read_pictures(tmp_path)]
    assert found == [("a.png", "image/png", b"others"), ("more/b.JPG", "image/jpeg", b"any bytes")]


def test_no_folder_and_no_pictures_are_said(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InvalidRequestError, match=str(folder)):
            read_pictures(folder)


def test_order_is_random_but_repeats_with_its_seed_and_leaves_nothing_out() -> None:
    first, again, other = (list(islice(endless(range(20), seed=seed), 40)) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first[:20]) == sorted(first[20:]) == list(range(20))
    assert first[:20] != first[20:]
