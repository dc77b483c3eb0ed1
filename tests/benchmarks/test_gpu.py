"""The check of a machine with a GPU: it runs as a whole on the CPU, and a section that goes wrong takes none along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu
from benchmarks._bench import ROOT, Outcome, Section, run_in_process
from benchmarks._gpu_answers import differences
from benchmarks._gpu_server import LOADS
from benchmarks._gpu_speed import CALLS
from benchmarks._measure import Report
from benchmarks.model import stage_ms
from service.structures import Detections, Prediction

# A benchmark of five sections: one measures, one raises, one hangs, one kills its process, one waits for another.
PROGRAM = """
import os, subprocess, sys, time
from pathlib import Path
from benchmarks._bench import Bench, Section, run_here

def measures(bench: Bench) -> None:
    bench.table("Lengths", ["what", "m"], [["a table", 1.5]])

def raises(bench: Bench) -> None:
    with bench.apart("a part"):
        raise ValueError("no such kernel")
    bench.table("Lengths", ["what", "m"], [["another table", 2]])
    raise RuntimeError("no such device")

def hangs(bench: Bench) -> None:
    time.sleep(600)

def dies(bench: Bench) -> None:
    bench.table("Lengths", ["what", "m"], [["before it died", 3]])
    print("Fatal Python error", flush=True)
    os._exit(11)

def waits(bench: Bench) -> None:
    lives = os.open(bench.folder.parent / "lives", os.O_WRONLY)
    subprocess.run(["sleep", "600"], pass_fds=[lives])

known = {one.__name__: Section(one.__name__, one, 0) for one in (measures, raises, hangs, dies, waits)}
option = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run_here(
    known, option["--sections"].split(","), device="cpu", quick=False, seconds=60, folder=Path(option["--out"])
)
"""


def run(folder: Path, names: Sequence[str], *, seconds: float = 60) -> list[Outcome]:
    (folder / "sections_of_a_test.py").write_text(PROGRAM)
    sections = [Section(name, lambda bench: None, seconds) for name in names]
    return run_in_process(
        sections, module="sections_of_a_test", device="cpu", quick=False, seconds=seconds, folder=folder
    )


def test_everything_runs_on_the_cpu(tmp_path: Path) -> None:
    gpu.main(device="cpu", quick=True, seconds=1200, out=tmp_path)
    tables = {one["title"]: one["rows"] for one in json.loads((tmp_path / "gpu.json").read_text())["tables"]}
    assert {row["section"]: row["outcome"] for row in tables[gpu.OUTCOMES]} == dict.fromkeys(gpu.SECTIONS, "done")
    assert [row["errors"] for row in tables[LOADS]] == ["0.0 %"]
    assert [row["batch"] for row in tables[CALLS]] == [1]
    assert "# " not in (tmp_path / "gpu.md").read_text()


def test_what_goes_wrong_in_a_section_is_told_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    raised, measured, died = run(tmp_path, ["raises", "measures", "dies"])
    assert raised.words == "a part: no such kernel; raises: no such device"
    assert raised.problems[1].endswith("RuntimeError: no such device")
    assert raised.tables == [("Lengths", ["what", "m"], [["another table", 2]])]
    assert measured.words == "done"
    assert measured.tables == [("Lengths", ["what", "m"], [["a table", 1.5]])]
    assert died.words == "its process ended with status 11"
    assert died.problems[0].endswith("Fatal Python error\n")
    assert died.tables == [("Lengths", ["what", "m"], [["before it died", 3]])]


def test_tables_are_printed_as_soon_as_their_section_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who stops the program, or the machine that is taken back, leaves what was found."""
    report = Report("gpu", tmp_path)
    ended = [Outcome("measures", 1.0, [], [("Lengths", ["what", "m"], [["a table", 1.5]])])]
    gpu._add(report, ended, ended)
    assert "a table" in capsys.readouterr().out
    assert "a table" in (tmp_path / "gpu.md").read_text()


def test_stages_of_a_replayed_batch_are_told_apart() -> None:
    """It has one of its own, and none of the others, whose columns stay empty."""
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32))
    replayed = [Prediction(nothing, {"graph": seconds}, 1) for seconds in (0.001, 0.003, 0.002)]
    assert str(stage_ms(replayed, "graph")) == "2 (1.5 – 2.5)"
    assert stage_ms(replayed, "backbone") == "–"


def test_section_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [hung] = run(tmp_path, ["hangs"], seconds=1)
    assert hung.words == "stopped after 1 s"


def test_a_section_and_what_it_started_end_with_the_program_whatever_kills_that(tmp_path: Path) -> None:
    (tmp_path / "sections_of_a_test.py").write_text(PROGRAM)
    os.mkfifo(tmp_path / "lives")
    program = [
        "from pathlib import Path; from benchmarks._bench import Section, run_in_process",
        "options = dict(module='sections_of_a_test', device='cpu', quick=False, seconds=600)",
        f"run_in_process([Section('waits', print, 600)], folder=Path({str(tmp_path)!r}), **options)",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "\n".join(program)]
    with (
        subprocess.Popen(command, cwd=ROOT, env=environment) as process,
        (tmp_path / "lives").open("rb") as lives,  # the section, and what it started, have it open for writing
    ):
        process.kill()
        assert lives.read() == b""  # until they have ended


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU that PyTorch can use; --device cpu --quick shows"):
        gpu.main(out=tmp_path)
    with pytest.raises(SystemExit, match=r"expected sections of prepare, .*, got sped"):
        gpu.main(device="cpu", quick=True, only="sped", out=tmp_path)


def test_objects_are_compared_with_their_partners() -> None:
    def found(*rows: tuple[float, int, float]) -> Detections:
        """Boxes of 10 x 10 pixels, each from its left side, its label and its score."""
        boxes = np.array([[left, 0, left + 10, 10] for left, _, _ in rows], np.float32)
        labels, scores = np.array([label for _, label, _ in rows]), np.array([score for *_, score in rows], np.float32)
        return Detections(boxes, labels, scores)

    reference = found((0, 1, 0.9), (50, 2, 0.8), (90, 1, 0.7))
    swapped = found((50.5, 2, 0.85), (0, 1, 0.75), (90, 2, 0.7))
    matched, of, boxes, scores = differences([reference], [swapped])
    assert (matched, of, boxes) == (2, 3, 0.5)
    assert scores == pytest.approx(0.15)


def test_requirements_are_pinned_as_everywhere() -> None:
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    lines = (ROOT / "benchmarks" / "gpu_requirements.txt").read_text().splitlines()
    needed = [line for line in lines if line and not line.startswith("#")]
    assert len(needed) > 20
    assert set(needed) <= set(constraints)
