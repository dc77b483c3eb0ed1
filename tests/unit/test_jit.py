"""Compiled loops: kept on disk where that is possible, compiled all the same where it is not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from service.jit import compiled


def test_code_is_kept_beside_its_source(tmp_path: Path) -> None:
    source = tmp_path / "loops.py"
    source.write_text("from service.jit import compiled\n\n@compiled()\ndef double(x):\n    return 2 * x\n")
    spec = importlib.util.spec_from_file_location("loops", source)
    assert spec is not None and spec.loader is not None
    loops = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loops)
    assert loops.double(21) == 42
    assert list(tmp_path.rglob("loops.double-*.nbc"))


def test_code_that_no_folder_can_hold_is_compiled_all_the_same() -> None:
    """As in a container with a read-only disk; numba looks for folders by the source file, and here there is none."""
    namespace: dict[str, Any] = {}
    exec("def double(x): return 2 * x", namespace)
    double = compiled()(namespace["double"])
    assert double(21) == 42
    assert double.signatures
