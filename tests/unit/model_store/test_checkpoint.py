import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from service.errors import ModelStoreError
from service.model_store.checkpoint import read_checkpoint

WEIGHTS = {"a": torch.tensor([1.0, 2.0]), "b.c": torch.tensor(3)}


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


def assert_read(path: Path) -> None:
    read = read_checkpoint(path)
    assert read.keys() == WEIGHTS.keys()
    assert all(read[key].equal(tensor) for key, tensor in WEIGHTS.items())


@pytest.mark.parametrize("zip_archive", [True, False])
def test_torch_files_of_both_formats_are_read(path: Path, zip_archive: bool) -> None:
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zip_archive)
    assert_read(path)


def test_safetensors_and_pickled_arrays_are_read(path: Path) -> None:
    safetensors.torch.save_file(WEIGHTS, path)
    assert_read(path)
    path.write_bytes(pickle.dumps({key: tensor.numpy() for key, tensor in WEIGHTS.items()}))
    assert_read(path)


def test_half_precision_becomes_float32(path: Path) -> None:
    torch.save({"a": torch.ones(2, dtype=torch.bfloat16)}, path)
    assert read_checkpoint(path)["a"].dtype == torch.float32


@pytest.mark.parametrize(
    "wrapped",
    [
        {"model": WEIGHTS, "epoch": 3, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=0.1)},
        {"state_dict": WEIGHTS},
        {"model": {"state_dict": WEIGHTS}},
        {f"module.{key}": tensor for key, tensor in WEIGHTS.items()},
        {"model": {f"module._orig_mod.{key}": tensor for key, tensor in WEIGHTS.items()}},
    ],
)
def test_wrappers_and_prefixes_of_training_scripts_are_taken_off(path: Path, wrapped: dict[str, Any]) -> None:
    torch.save(wrapped, path)
    assert_read(path)


@pytest.mark.parametrize("zip_archive", [True, False])
def test_a_malicious_torch_file_is_refused_without_being_run(path: Path, tmp_path: Path, zip_archive: bool) -> None:
    target = tmp_path / "made"
    torch.save({"model": WEIGHTS, "x": Malicious(target)}, path, _use_new_zipfile_serialization=zip_archive)
    with pytest.raises(ModelStoreError, match=r"got (posix|nt)\.mkdir, which was not run"):
        read_checkpoint(path)
    assert not target.exists()


def test_a_malicious_pickle_is_refused_without_being_run(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    path.write_bytes(pickle.dumps({"model": {"a": np.zeros(1)}, "x": Malicious(target)}))
    with pytest.raises(
        ModelStoreError, match=r"checkpoint: expected a pickle of arrays, got .*mkdir, which was not run"
    ):
        read_checkpoint(path)
    assert not target.exists()


def test_a_whole_pickled_module_is_refused_with_the_way_out(path: Path) -> None:
    torch.save(nn.Linear(1, 1), path)
    with pytest.raises(
        ModelStoreError, match=r"got torch\.nn\.modules\.linear\.Linear.*save `model\.state_dict\(\)` alone"
    ):
        read_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_a_truncated_file_is_refused(path: Path, keep: int) -> None:
    torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelStoreError, match=str(path)):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([1, 2], "expected weights by name, got list"),
        ({}, "expected weights by name, got dict"),
        ({**WEIGHTS, "epoch": 3}, r"expected nothing but weights by name, got epoch \(int\)"),
        ({1: torch.zeros(1)}, r"got 1 \(Tensor\)"),
    ],
)
def test_what_is_no_state_dict_is_refused(path: Path, content: object, problem: str) -> None:
    torch.save(content, path)
    with pytest.raises(ModelStoreError, match=problem):
        read_checkpoint(path)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(ModelStoreError, match="checkpoint: cannot be read: No such file"):
        read_checkpoint(path)
