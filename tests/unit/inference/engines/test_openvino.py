"""The OpenVINO engine keeps what it compiled, trusts no damaged file, writes nowhere else and tells nobody."""

from __future__ import annotations

import errno
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from service.inference.engines.folding import fold
from tests.unit.inference.engines.networks import network

openvino = pytest.importorskip("service.inference.engines.openvino")
FAMILY = "fpn with masks"


def features_of(cache_dir: Path, *, key: str = "key") -> torch.Tensor:
    model = network(FAMILY)
    fold(model)
    parts = openvino.OpenVinoNetwork(model, key=key, precision="float32", cache_dir=cache_dir).parts()
    with torch.inference_mode():
        maps: torch.Tensor = parts.trunk(torch.ones(1, 3, 64, 96)).features["0"].clone()
    return maps


def test_a_second_start_reads_what_the_first_compiled(tmp_path: Path) -> None:
    first = features_of(tmp_path)
    with patch.object(openvino, "_converted", side_effect=AssertionError("compiled again")):
        torch.testing.assert_close(features_of(tmp_path), first, rtol=0, atol=0)
        with pytest.raises(AssertionError, match="compiled again"):
            features_of(tmp_path, key="other weights")


def test_ctrl_c_in_the_conversion_is_no_failed_conversion(tmp_path: Path) -> None:
    stop = patch.object(openvino.TorchScriptPythonDecoder, "mark_node", side_effect=KeyboardInterrupt)
    with stop, pytest.raises(KeyboardInterrupt):
        features_of(tmp_path)


def test_a_new_size_compiles_nothing(tmp_path: Path) -> None:
    model = network(FAMILY)
    fold(model)
    parts = openvino.OpenVinoNetwork(model, key="key", precision="float32", cache_dir=tmp_path).parts()
    with (
        patch.object(openvino._Compiler, "load", side_effect=AssertionError("compiled again")),
        torch.inference_mode(),
    ):
        for shape in ((1, 3, 64, 96), (3, 3, 96, 32), (2, 3, 160, 128)):
            batch = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            expected = model.own_parts().trunk(batch)
            torch.testing.assert_close(parts.trunk(batch).objectness, expected.objectness, rtol=0, atol=1e-4)
    assert len(list(tmp_path.iterdir())) == 4  # the mask head has two


def trunk_of(cache_dir: Path, *, shifts_weights: float = 0) -> Any:
    model = network(FAMILY)
    fold(model)
    for weights in model.parameters():
        weights.data += shifts_weights
    return openvino.OpenVinoNetwork(model, key=shifts_weights, precision="float32", cache_dir=cache_dir)._trunk


def test_a_size_that_comes_often_gets_a_graph_with_the_same_outputs(tmp_path: Path) -> None:
    trunk = trunk_of(tmp_path)
    batch = torch.rand((4, 3, 96, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = [one.clone() for one in trunk(batch)]
        assert trunk._thread is None
        trunk(batch)
        thread: Any = trunk._thread
        thread.join()
        assert list(trunk._graphs) == [(96, 64)]
        with patch.object(trunk, "_for_any_size", side_effect=AssertionError("the graph for any size")):
            for count in (1, 4, 2):
                for ours, expected in zip(trunk(batch[:count]), before, strict=True):
                    torch.testing.assert_close(ours, expected[:count], rtol=0, atol=0)
            with pytest.raises(AssertionError, match="for any size"):
                trunk(batch[:, :, :64])
    assert len(list(tmp_path.iterdir())) == 1


def test_a_graph_with_other_outputs_does_not_take_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    trunk = trunk_of(tmp_path)
    trunk._compile_for = trunk_of(tmp_path, shifts_weights=0.01)._compile_for
    batch = torch.ones(8, 3, 64, 64)
    expected = [one.clone() for one in trunk(batch)]
    trunk._thread.join()
    assert not trunk._graphs
    assert "no graph for this size of picture" in caplog.text
    trunk(batch)  # and is not tried again
    for ours, one in zip(trunk(batch), expected, strict=True):
        torch.testing.assert_close(ours, one, rtol=0, atol=0)


def test_no_further_graph_is_made_when_memory_is_short(tmp_path: Path) -> None:
    trunk = trunk_of(tmp_path)
    with patch("service.inference.engines.openvino_graphs.available_bytes", return_value=1_000_000):
        trunk(torch.ones(8, 3, 64, 64))
    assert trunk._thread is None


def test_a_damaged_file_is_compiled_anew(tmp_path: Path) -> None:
    first = features_of(tmp_path)
    for file in tmp_path.iterdir():
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    torch.testing.assert_close(features_of(tmp_path), first, rtol=0, atol=0)


def test_a_whole_file_that_openvino_does_not_read_is_compiled_anew(tmp_path: Path) -> None:
    first = features_of(tmp_path)
    for file in tmp_path.iterdir():
        openvino._write(file, b"of another time")
    torch.testing.assert_close(features_of(tmp_path), first, rtol=0, atol=0)


@pytest.mark.parametrize("package", ["roiserve", "openvino", "torch", "torchvision", "timm"])
def test_what_another_version_compiled_is_not_read(package: str, tmp_path: Path) -> None:
    features_of(tmp_path)
    other = patch.object(openvino, "version", lambda name: "other" if name == package else version(name))
    again = patch.object(openvino, "_converted", side_effect=AssertionError("compiled again"))
    with other, again, pytest.raises(AssertionError, match="compiled again"):
        features_of(tmp_path)


def test_what_other_code_compiled_is_not_read(tmp_path: Path) -> None:
    """As in a checkout after `git pull`: the version is the same."""
    room = tmp_path / "modeling"
    room.mkdir()
    hashes = []
    for code in ("shape = (14, 14, 2, 2)", "shape = (28, 28)"):
        (room / "parts.py").write_text(code)
        hashes.append(openvino._sources_sha256.__wrapped__(tmp_path))
    assert len(set(hashes)) == 2
    features_of(tmp_path)
    other = patch.object(openvino, "_sources_sha256", return_value=hashes[0])
    again = patch.object(openvino, "_converted", side_effect=AssertionError("compiled again"))
    with other, again, pytest.raises(AssertionError, match="compiled again"):
        features_of(tmp_path)


def test_heads_run_chunk_by_chunk_as_in_one(tmp_path: Path) -> None:
    """Around the size of a chunk, where an output that is overwritten or a last row left out would show."""
    model = network(FAMILY)
    own = model.own_parts()
    parts = openvino.OpenVinoNetwork(model, key="key", precision="float32", cache_dir=tmp_path).parts()
    assert own.mask_head is not None
    boxes, masks = openvino._BOX_PATCHES, openvino._MASK_PATCHES
    with torch.inference_mode():
        for count in (boxes - 1, boxes, boxes + 1, 2 * boxes + 3):
            pooled = torch.randn(count, 16, 7, 7)
            for ours, expected in zip(parts.box_head(pooled), own.box_head(pooled), strict=True):
                torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        for count in (masks - 1, masks, masks + 1, 3 * masks):
            pooled, labels = torch.randn(count, 16, 14, 14), torch.arange(count) % 3 + 1
            torch.testing.assert_close(
                parts.mask_head(pooled, labels), own.mask_head(pooled, labels), atol=1e-4, rtol=1e-4
            )


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert features_of(tmp_path / "file" / "folder").isfinite().all()


def test_a_full_disk_keeps_no_half_of_a_part(tmp_path: Path) -> None:
    def write_half(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "no space left on device")

    with patch.object(Path, "write_bytes", write_half):
        assert features_of(tmp_path).isfinite().all()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_sent_and_nothing_written_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    with patch.object(socket, "socket", side_effect=AssertionError), patch.object(socket, "getaddrinfo") as look_up:
        features_of(tmp_path / "cache")
    look_up.assert_not_called()
    assert list(home.iterdir()) == []
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {".openvino"}
