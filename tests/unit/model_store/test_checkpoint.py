import argparse
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

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
    read = read_checkpoint(path).weights
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(path: Path, dtype: torch.dtype) -> None:
    torch.save({"a": torch.ones(2, dtype=dtype)}, path)
    assert read_checkpoint(path).weights["a"].dtype == torch.float32


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


def test_a_checkpoint_of_torchvisions_reference_scripts_is_read(path: Path) -> None:
    """They save the whole state of the training, their command line among it."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [16, 22]).state_dict(),
        "args": argparse.Namespace(lr=0.1, lr_steps=[16, 22], device="cuda", output_dir=".", amp=False),
        "epoch": 25,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
    }
    torch.save(content, path)
    assert read_checkpoint(path).weights.keys() == {"weight", "bias"}


@pytest.mark.parametrize("key", ["model_ema", "ema", "state_dict_ema", "ema_state_dict"])
def test_averaged_weights_are_taken_when_asked_for_or_alone(path: Path, key: str) -> None:
    averaged = AveragedModel(nn.Linear(1, 1)).state_dict()  # prefixed with `module.`, and with a count of its own
    torch.save({key: averaged, "model": WEIGHTS}, path)
    assert_read(path)
    assert read_checkpoint(path, averaged=True).weights["weight"].equal(averaged["module.weight"])
    torch.save({key: averaged}, path)
    assert read_checkpoint(path).weights.keys() == {"weight", "bias"}


def test_averaged_weights_that_are_not_there_are_missed(path: Path) -> None:
    torch.save({"model": WEIGHTS}, path)
    with pytest.raises(ModelStoreError, match=r"expected averaged weights under a key such as model_ema, .*, got none"):
        read_checkpoint(path, averaged=True)


def test_a_torchscript_program_and_an_empty_file_are_called_what_they_are(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("checkpoint/constants.pkl", pickle.dumps(()))
        archive.writestr("checkpoint/data.pkl", pickle.dumps(()))
        archive.writestr("checkpoint/version", "3\n")
    with pytest.raises(ModelStoreError, match="got a TorchScript program; save"):
        read_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ModelStoreError, match="expected a checkpoint, got an empty file"):
        read_checkpoint(path)


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
        ModelStoreError, match=r"checkpoint: expected a checkpoint of tensors, got .*mkdir, which was not run"
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
        ({"epoch": 3, "best": 0.5}, r"expected nothing but weights by name, got epoch \(int\), best \(float\)"),
        ({1: torch.zeros(1)}, r"got torch\._utils\._rebuild_tensor_v2, which was not run"),
    ],
)
def test_what_is_no_state_dict_is_refused(path: Path, content: object, problem: str) -> None:
    torch.save(content, path)
    with pytest.raises(ModelStoreError, match=problem):
        read_checkpoint(path)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(ModelStoreError, match="checkpoint: cannot be read: No such file"):
        read_checkpoint(path)
