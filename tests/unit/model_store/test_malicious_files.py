"""Checkpoints that are programs: every instruction by which a pickle can call something, in each kind of file
that may hold a pickle. All of them work on an unsuspecting reader, and none on ours.
"""

from __future__ import annotations

import copyreg
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from service.errors import ModelStoreError
from service.model_store.checkpoint import read_checkpoint


def programs(target: Path) -> dict[str, bytes]:
    """Pickles that make the folder `target` when they are run, by the instruction that does it."""
    name = str(target).encode()
    text = b"X" + len(name).to_bytes(4, "little") + name  # BINUNICODE
    mkdir, make_directory = b"cos\nmkdir\n", b"(S'" + name + b"'\nios\nmkdir\n"
    stack_global = b"\x8c\x02os\x8c\x05mkdir\x93"
    return {
        "GLOBAL and REDUCE": b"\x80\x02" + mkdir + text + b"\x85R.",
        "STACK_GLOBAL and REDUCE": b"\x80\x04" + stack_global + text + b"\x85R.",
        "INST": b"\x80\x02" + make_directory + b".",
        "OBJ": b"\x80\x02(" + mkdir + text + b"o.",
        "NEWOBJ": b"\x80\x02cpathlib\nPath\n" + text + b"\x85\x81" + b"0" + mkdir + text + b"\x85R.",
        "NEWOBJ_EX": b"\x80\x04" + b"cbuiltins\nmap\n" + mkdir + b"(" + text + b"l\x86}\x92" + b"\x8c\x00" + b"0"
        + b"cbuiltins\nlist\n" + b"0" + b"\x94" + b"cbuiltins\nlist\n" + b"h\x00\x85R.",
        "EXT1": b"\x80\x02\x82\xf0" + text + b"\x85R.",
        "EXT2": b"\x80\x02\x83\xf0\x00" + text + b"\x85R.",
        "EXT4": b"\x80\x02\x84\xf0\x00\x00\x00" + text + b"\x85R.",
        "inside the weights": b"\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00a" + mkdir + text + b"\x85Rss.",
        "a call of what a call gave": b"\x80\x02cbuiltins\ngetattr\n" + b"cos\npath\n0" + b"cos\nmkdir\n"
        + b"X\x08\x00\x00\x00__call__\x86R" + text + b"\x85R.",
    }  # fmt: skip


def as_pkl(path: Path, program: bytes) -> None:
    path.write_bytes(program)


def as_zip(path: Path, program: bytes) -> None:
    """As `torch.save` packs it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


def as_legacy_torch(path: Path, program: bytes) -> None:
    """As `torch.save` wrote before it wrote zip archives: a magic number, a version, the system, the object."""
    start = b"".join(pickle.dumps(one, protocol=2) for one in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    path.write_bytes(start + program)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "made"


@pytest.fixture(autouse=True)
def registered_extension() -> Iterator[None]:
    """An application may have registered `os.mkdir` for the EXT instructions."""
    copyreg.add_extension("os", "mkdir", 0xF0)
    yield
    copyreg.remove_extension("os", "mkdir", 0xF0)


INSTRUCTIONS = list(programs(Path("x")))


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_the_programs_are_malicious(instruction: str, target: Path) -> None:
    """Or the next test would prove nothing."""
    pickle.loads(programs(target)[instruction])
    assert target.exists()


@pytest.mark.parametrize("pack", [as_pkl, as_zip, as_legacy_torch])
@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_no_instruction_of_a_pickle_makes_us_run_it(
    instruction: str, pack: Callable[[Path, bytes], None], target: Path, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pth"
    pack(path, programs(target)[instruction])
    with pytest.raises(ModelStoreError, match=str(path)):
        read_checkpoint(path)
    assert not target.exists()


@pytest.mark.parametrize("name", ["argparse.Namespace", "collections.OrderedDict", "torch._utils._rebuild_tensor_v2"])
@pytest.mark.parametrize("pack", [as_pkl, as_zip])
def test_what_may_be_named_cannot_be_made_to_set_attributes_of_what_may_not(
    name: str, pack: Callable[[Path, bytes], None], tmp_path: Path
) -> None:
    """BUILD on a class or function itself would change it for the whole process."""
    module, _, attribute = name.rpartition(".")
    path = tmp_path / "checkpoint.pth"
    pack(path, f"\x80\x02c{module}\n{attribute}\n".encode("latin-1") + b"}X\x07\x00\x00\x00changedK\x01sb.")
    with pytest.raises(ModelStoreError, match=str(path)):
        read_checkpoint(path)
    assert not hasattr(torch._utils._rebuild_tensor_v2, "changed")


def test_a_pickle_beside_the_weights_of_a_zip_is_not_even_read(target: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"a": torch.ones(1)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("checkpoint/extra.pkl", programs(target)["GLOBAL and REDUCE"])
    assert read_checkpoint(path).weights.keys() == {"a"}
    assert not target.exists()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    os.mkfifo(path)
    with pytest.raises(ModelStoreError, match="expected a regular file"):
        read_checkpoint(path)


def test_a_tensor_of_a_million_dimensions_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [1] * 1_000_000, "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ModelStoreError, match="a tensor of 1000000 dimensions"):
        read_checkpoint(path)
