import argparse
import json
import os
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
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
        ([[]], "expected weights by name, got list"),
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
    with pytest.raises(ModelStoreError, match="checkpoint: no such file"):
        read_checkpoint(path)


DETECTOR = {
    "backbone.body.conv1.weight": torch.ones(2, 3),
    "roi_heads.box_predictor.cls_score.weight": torch.ones(4, 2),
    "roi_heads.box_predictor.cls_score.bias": torch.zeros(4),
}


def prefixed(prefix: str, factor: float = 1) -> dict[str, torch.Tensor]:
    return {f"{prefix}{key}": tensor * factor for key, tensor in DETECTOR.items()}


@pytest.mark.parametrize(
    "prefix", ["", "module.", "detector.", "net.", "module.model.my_detector.", "_orig_mod.module."]
)
@pytest.mark.parametrize("key", [None, "net", "weights", "model_state", "anything else"])
def test_a_detector_is_found_under_any_key_and_behind_any_prefix(path: Path, prefix: str, key: str | None) -> None:
    weights = prefixed(prefix)
    torch.save(weights if key is None else {"epoch": 3, key: weights, "losses": [0.5]}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.weights.keys() == DETECTOR.keys()
    assert checkpoint.left_out == ()
    assert checkpoint.found_at == ".".join(filter(None, (key, prefix.rstrip("."))))


def test_a_detector_in_a_list_is_found_too(path: Path) -> None:
    torch.save({"models": [DETECTOR], "epoch": 3}, path)
    assert read_checkpoint(path).found_at == "models.0"


def test_tensors_that_are_not_the_detectors_are_left_out_and_named(path: Path) -> None:
    torch.save(
        {"state_dict": {**prefixed("model."), "class_weights": torch.ones(4), "loss.scale": torch.ones(1)}}, path
    )
    assert read_checkpoint(path).left_out == ("class_weights", "loss.scale")
    torch.save({**DETECTOR, "class_weights": torch.ones(4)}, path)
    assert read_checkpoint(path).left_out == ("class_weights",)
    assert read_checkpoint(path).weights.keys() == DETECTOR.keys()


class Settings(dict[str, object]):
    """As yacs and others have them: a dict of a class that is not installed where it is read."""


@pytest.mark.parametrize("zip_archive", [True, False])
def test_python_objects_beside_the_weights_are_passed_over(path: Path, zip_archive: bool) -> None:
    content = {
        "model": DETECTOR,
        "best_map": np.float64(0.5),
        "curve": np.arange(3),
        "where": Path("/data"),
        "counts": defaultdict(int, {"a": 1}),
        "args": argparse.Namespace(lr=0.1),
        "config": Settings(lr=0.1),
        "seen": {1, 2},
        "when": datetime.now(UTC),
        "pairs": {(1, 2): 3},
    }
    torch.save(content, path, _use_new_zipfile_serialization=zip_archive)
    assert read_checkpoint(path).weights.keys() == DETECTOR.keys()


def test_weights_in_another_dict_are_read(path: Path) -> None:
    torch.save({"model": defaultdict(torch.Tensor, DETECTOR)}, path)
    assert read_checkpoint(path).weights.keys() == DETECTOR.keys()
    path.write_bytes(pickle.dumps({"model": DETECTOR}))  # by pickle alone, not by torch.save
    assert read_checkpoint(path).weights.keys() == DETECTOR.keys()


def test_of_two_detectors_the_averaged_one_is_taken_when_asked_for(path: Path) -> None:
    """As the package ema-pytorch keeps both, side by side."""
    torch.save({**prefixed("online_model."), **prefixed("ema_model.", 2), "initted": torch.ones(1)}, path)
    key = "backbone.body.conv1.weight"
    assert read_checkpoint(path).weights[key].equal(DETECTOR[key])
    assert read_checkpoint(path, averaged=True).weights[key].equal(DETECTOR[key] * 2)
    assert "initted" in read_checkpoint(path).left_out


def test_two_detectors_without_a_difference_are_refused_with_their_places(path: Path) -> None:
    torch.save({**prefixed("first."), **prefixed("second.")}, path)
    with pytest.raises(ModelStoreError, match="expected one detector, got 2, under first, second: save one of them"):
        read_checkpoint(path)


def test_fifty_thousand_prefixes_are_taken_off_at_once(path: Path) -> None:
    torch.save(prefixed("module." * 50_000), path)
    assert read_checkpoint(path).weights.keys() == DETECTOR.keys()


def test_shards_are_read_by_their_index(path: Path) -> None:
    names = list(DETECTOR)
    files = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        shard = {name: DETECTOR[name] for name in names if files[name] == file}
        safetensors.torch.save_file(shard, path.with_name(file))
    index = path.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    assert read_checkpoint(index).weights.keys() == DETECTOR.keys()
    with pytest.raises(ModelStoreError, match=r"got one of several shards; .* model\.safetensors\.index\.json"):
        read_checkpoint(path.with_name("model-00001-of-00002.safetensors"))
    path.with_name("model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelStoreError, match=r"the shard model-00002-of-00002\.safetensors is not beside the index"):
        read_checkpoint(index)


def test_shards_of_torch_files_are_read_too_but_none_from_elsewhere(path: Path) -> None:
    torch.save(DETECTOR, path.with_name("pytorch_model-00001-of-00001.bin"))
    index = path.with_name("pytorch_model.bin.index.json")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(DETECTOR, "pytorch_model-00001-of-00001.bin")}))
    assert read_checkpoint(index).weights.keys() == DETECTOR.keys()
    index.write_text(json.dumps({"weight_map": dict.fromkeys(DETECTOR, "../other.bin")}))
    with pytest.raises(ModelStoreError, match=r"expected shards beside the index, got '\.\./other\.bin'"):
        read_checkpoint(index)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89HDF\r\n\x1a\n" + b"\x00" * 20, "HDF5 file, such as Keras"),
        (b"\x08\x07\x12\x07pytorch\x1a\x052.0.0" + b"\x00" * 20, "an ONNX program"),
        (b"<!DOCTYPE html><html>not found", "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        (b"hello, these are no weights", "a text"),
        (b'{"a": 1}', "expected an index of shards"),
        (b"\xff\x00\x11\x99" * 9, "something else, or only a part of one"),
    ],
)
def test_files_of_other_kinds_are_called_what_they_are(path: Path, content: bytes, words: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ModelStoreError, match=words):
        read_checkpoint(path)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(path: Path) -> None:
    """torch never compresses; a file of two megabytes would become two gigabytes."""
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(ModelStoreError, match="got a zip archive with compressed files"):
        read_checkpoint(path)


@pytest.mark.parametrize("tensor", [torch.zeros(1).expand(10**12), torch.zeros(1, dtype=torch.float16).expand(10**9)])
def test_a_tensor_that_claims_more_than_any_weight_has_is_refused(path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor}, path)
    with pytest.raises(ModelStoreError, match="a: a tensor claims 1e"):
        read_checkpoint(path)


def test_a_view_of_half_precision_stays_as_small_as_its_storage(path: Path) -> None:
    torch.save({"a": torch.ones(1, dtype=torch.float16).expand(1000)}, path)
    read = read_checkpoint(path).weights["a"]
    assert read.shape == (1000,)
    assert read.untyped_storage().nbytes() == 4


def test_an_optimizers_state_is_never_read(path: Path) -> None:
    """Its bytes may even be damaged: what is not asked for is left where it is."""
    torch.save({"model": DETECTOR, "optimizer": {"state": {0: {"momentum": torch.full((50,), 7.0)}}}}, path)
    damaged = path.read_bytes().replace(np.full(50, 7, np.float32).tobytes(), bytes(200))
    path.write_bytes(damaged)
    assert read_checkpoint(path).weights.keys() == DETECTOR.keys()


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"meta": {"CLASSES": ("a", "b", "c")}}, ("a", "b", "c")),
        ({"config": {"CLASSES": ["__background__", "a", "b", "c"]}}, ("__background__", "a", "b", "c")),
        ({"id2label": {0: "a", 1: "b", 2: "c"}}, ("a", "b", "c")),
    ],
)
def test_class_names_beside_the_weights_are_found(path: Path, content: dict[str, Any], names: tuple[str, ...]) -> None:
    torch.save({"model": DETECTOR, **content}, path)
    assert read_checkpoint(path).labels == (names,)
