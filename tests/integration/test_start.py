"""`roiserve serve` from the command to ready, with a model that comes with the repository."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from benchmarks._detectors import BUNDLED
from benchmarks.serve import caches_in, running_server
from service.model_store.store import ModelStore

# Sent to all processes by terminals and service managers; only the one that serves HTTP is to hear them.
SIGNALS_TO_ALL = 1 << (signal.SIGINT - 1) | 1 << (signal.SIGTERM - 1)
NUCLEI = ModelStore(BUNDLED).find("nuclei")


def files_in(folder: Path) -> dict[Path, int]:
    """When each of them was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def blocked_signals(pid: int) -> int:
    """As bits."""
    [line] = [one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("SigBlk:")]
    return int(line.split()[1], 16)


def test_second_start_compiles_nothing_and_torchs_waiting_threads_may_sleep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP's variables count as they are when its library is loaded: those that a process was started with do."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    with running_server([NUCLEI], workers="default", environment=caches_in(tmp_path)):
        pass
    kept = files_in(tmp_path)
    assert {path.suffix for path in kept} == {".openvino", ".nbi", ".nbc"}
    others = set(psutil.Process().children(recursive=True))
    with running_server([NUCLEI], workers="default", environment=caches_in(tmp_path)):
        started = set(psutil.Process().children(recursive=True)) - others
        with_openmp = [one for one in started if any("libgomp" in area.path for area in one.memory_maps())]
        assert {one.environ().get("GOMP_SPINCOUNT") for one in with_openmp} == {"1000"}
        # What they import does not depend on the folder in which the server was started.
        assert {one.environ().get("PYTHONSAFEPATH") for one in with_openmp} == {"1"}
        assert {blocked_signals(one.pid) & SIGNALS_TO_ALL for one in with_openmp} == {SIGNALS_TO_ALL}
    assert files_in(tmp_path) == kept
