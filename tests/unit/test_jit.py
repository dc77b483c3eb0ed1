"""Compiled loops: kept on disk where that is possible, compiled all the same where it is not."""

from __future__ import annotations

import errno
import importlib.util
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from service.jit import compiled


def test_code_is_kept_beside_its_source(tmp_path: Path) -> None:
    assert double_in(tmp_path)(21) == 42
    assert list(tmp_path.rglob("loops.double-*.nbc"))


def test_code_that_no_folder_can_hold_is_compiled_all_the_same() -> None:
    """As in a container with a read-only disk; numba looks for folders by the source file, and here there is none."""
    namespace: dict[str, Any] = {}
    exec("def double(x): return 2 * x", namespace)
    double = compiled()(namespace["double"])
    assert double(21) == 42
    assert double.signatures


def double_in(folder: Path) -> Any:
    """A compiled function of a source file in this folder, in whose `__pycache__` numba keeps its code."""
    source = folder / "loops.py"
    source.write_text("from service.jit import compiled\n\n@compiled()\ndef double(x):\n    return 2 * x\n")
    spec = importlib.util.spec_from_file_location("loops", source)
    assert spec is not None and spec.loader is not None
    loops = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loops)
    return loops.double


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_full_or_read_only_disk_costs_time_and_not_the_call(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = OSError(number, os.strerror(number))
    with patch("numba.core.caching.IndexDataCacheFile.save", side_effect=full):
        double = double_in(tmp_path)
        assert double(21) == 42
        assert double(2.5) == 5
    assert not list(tmp_path.rglob("*.nbc"))
    assert caplog.text.count("cannot keep a compiled loop") == 1  # said once, not for each signature


def test_code_on_disk_is_read_and_not_compiled_again(tmp_path: Path) -> None:
    assert double_in(tmp_path)(21) == 42
    double = double_in(tmp_path)
    assert double(21) == 42
    assert sum(double.stats.cache_hits.values()) == 1


@pytest.mark.parametrize("suffix", [".nbc", ".nbi"])
def test_damaged_code_on_disk_is_compiled_anew(suffix: str, tmp_path: Path) -> None:
    assert double_in(tmp_path)(21) == 42
    (file,) = tmp_path.rglob(f"loops.double-*{suffix}")
    file.write_bytes(file.read_bytes()[:20])
    assert double_in(tmp_path)(21) == 42
    double = double_in(tmp_path)
    assert double(21) == 42
    assert double.stats.cache_hits  # it was kept again
