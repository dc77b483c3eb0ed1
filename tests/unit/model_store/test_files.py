"""A model folder may hold anything at all: what is no sensible file is refused, quickly and without waiting."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from service.errors import ModelStoreError
from service.model_store.files import MAX_TEXT_BYTES, check_safetensors, read_text, sha256_of


def test_text_is_read_as_utf8(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("ядро")
    assert read_text(tmp_path / "text") == "ядро"


def test_a_pipe_that_nobody_writes_to_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (read_text, sha256_of, check_safetensors):
        with pytest.raises(ModelStoreError, match="expected a regular file, got a pipe"):
            read(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("path", "words"), [("/dev/zero", "a device"), ("/", "a folder"), ("/no/such", "no such file")]
)
def test_what_is_no_file_is_said(path: str, words: str) -> None:
    with pytest.raises(ModelStoreError, match=words):
        read_text(Path(path))


def test_a_link_to_a_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_text(tmp_path / "link") == "x"


def test_a_huge_text_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole, which takes no room on the disk
    with pytest.raises(ModelStoreError, match=f"at most {MAX_TEXT_BYTES:,} bytes"):
        read_text(path)


def test_a_header_tells_the_shapes(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"x": "y"}})
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(24))
    assert check_safetensors(path) == {"a": (2, 3)}


@pytest.mark.parametrize("shape", [None, "x", [[1]], {"a": 1}])
def test_a_header_without_sensible_shapes_is_no_safetensors(tmp_path: Path, shape: object) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}})
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(ModelStoreError, match="expected a safetensors file"):
        check_safetensors(path)
