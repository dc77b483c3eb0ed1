"""The sections of a long benchmark, each in a process of its own with a time limit, so that one that fails, hangs or
kills its process costs only its own tables.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._measure import Cell, Report, Spread
from service.model_store.store import ModelStore, StoredModel

ROOT = Path(__file__).parent.parent
RANDOM_MODEL = "maskrcnn-resnet50-fpn"
# The environment variable that says so to a section's process.
_ENDS_WITH_STDIN = "BENCHMARK_ENDS_WITH_STDIN"
_TRACEBACK_LINES = 14
_OUTPUT_CHARACTERS = 2000


@dataclass(eq=False)
class Bench:
    """What a section gets: where to measure, how much time is left, and where its tables go.

    Attributes:
        device: `cpu` or `cuda`.
        quick: whether figures do not matter, only that everything runs.
        folder: for the models, pictures and compiled code that the sections share.
        ends_at: when the section's process is killed, in seconds of `time.monotonic`.
        problems: what failed so far, one text for each.
    """

    device: str
    quick: bool
    folder: Path
    ends_at: float
    report: Report
    problems: list[str] = field(default_factory=list)

    @property
    def half(self) -> str:
        """The half precision to measure: `auto`'s on CUDA."""
        return "bfloat16" if self.device == "cpu" else "float16"

    @property
    def cache_dir(self) -> Path:
        """Where engines keep compiled code for the later sections."""
        return self.folder / "engines"

    @property
    def store(self) -> Path:
        """The store with `stored` and `blood-cells` in it."""
        return ROOT / "model_store" if self.quick else self.folder / "store"

    @property
    def stored(self) -> StoredModel:
        """The model that is measured: a bundled one if quick, else a Mask R-CNN with random weights."""
        return ModelStore(self.store).find("nuclei" if self.quick else RANDOM_MODEL)

    def has_seconds(self, seconds: float) -> bool:
        """Whether so much time is left."""
        return time.monotonic() + seconds < self.ends_at

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """See `Report.table`."""
        self.report.table(title, columns, rows)

    @contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """A part of the section that may fail without ending it."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            lines = traceback.format_exc().strip().splitlines()
            self.problems.append("\n".join([f"{name}: {first(str(error))}", *lines[-_TRACEBACK_LINES:]]))


def first(text: str) -> str:
    """The first line that says anything, shortened."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]


Run = Callable[[Bench], None]


@dataclass(frozen=True)
class Section:
    """One part of the benchmark.

    Attributes:
        name: also that of its files.
        run: fills the tables.
        seconds: its process is killed after so many.
    """

    name: str
    run: Run
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How a section ended.

    Attributes:
        seconds: how long it took; None if it did not begin.
        problems: what failed.
        tables: title, columns and rows of what it measured before it ended.
    """

    section: str
    seconds: float | None
    problems: Sequence[str]
    tables: Sequence[tuple[str, list[str], list[list[Cell]]]] = ()

    @property
    def words(self) -> str:
        """For the table of sections."""
        if self.seconds is None:
            return "left out: no time"
        return "; ".join(first(one) for one in self.problems) or "done"

    def __str__(self) -> str:
        took = "" if self.seconds is None else f" ({self.seconds:.0f} s)"
        return "\n".join([f"{self.section}: {self.words}{took}", *self.problems])


def run_in_process(
    sections: Sequence[Section], *, module: str, device: str, quick: bool, seconds: float, folder: Path
) -> list[Outcome]:
    """Run some sections, one after the other, in one process of their own.

    Args:
        sections: of `module`.
        module: called as `python -m MODULE --sections NAME,NAME …`; it calls `run_here`.
        seconds: when to kill it and all processes that it started.
        folder: for its files.
    """
    names = [section.name for section in sections]
    for name in names:
        (folder / f"{name}.outcome").unlink(missing_ok=True)
        (folder / f"{name}.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", module, "--device", device, "--sections", ",".join(names), "--out", str(folder)]
    command += ["--seconds", f"{seconds:g}", *(["--quick"] if quick else [])]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", _ENDS_WITH_STDIN: "1"}
    begin = time.monotonic()
    ending = ""
    log = folder / f"{names[0]}.log"
    with log.open("wb") as output:
        # In a session of its own, so that its servers and their workers can be ended with it. Its standard input is a
        # pipe that closes when this process ends, however that comes about.
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            status = child.wait(seconds)
            ending = f"its process ended with status {status}"
        except subprocess.TimeoutExpired:
            ending = f"stopped after {seconds:.0f} s"
        finally:
            _end(child)
    written = log.read_text(errors="replace")[-_OUTPUT_CHARACTERS:]
    outcomes = []
    for name in names:
        kept = folder / f"{name}.outcome"
        if kept.exists():
            told = json.loads(kept.read_text())
            outcomes.append(Outcome(name, told["seconds"], told["problems"], _tables(folder / f"{name}.json")))
        else:
            problem = f"{ending}\n{written}"
            outcomes.append(Outcome(name, time.monotonic() - begin, [problem], _tables(folder / f"{name}.json")))
    return outcomes


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill all processes of the child's session that are left."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert child.stdin is not None
    child.stdin.close()


def _end_with_stdin() -> None:
    """End this process and all that it started when its standard input closes."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def _tables(file: Path) -> list[tuple[str, list[str], list[list[Cell]]]]:
    if not file.exists():
        return []
    tables = json.loads(file.read_text())["tables"]
    return [
        (one["title"], list(one["rows"][0]), [[_cell(value) for value in row.values()] for row in one["rows"]])
        for one in tables
        if one["rows"]
    ]


def _cell(value: Any) -> Cell:
    cell: Cell = Spread(**value) if isinstance(value, dict) else value
    return cell


def run_here(
    known: Mapping[str, Section], names: Sequence[str], *, device: str, quick: bool, seconds: float, folder: Path
) -> None:
    """Run sections in this process; each writes `NAME.json` as it goes and `NAME.outcome` at its end. This process and
    all that it starts end with the one that called `run_in_process`.
    """
    if os.environ.get(_ENDS_WITH_STDIN):
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    ends_at = time.monotonic() + seconds
    shared = folder / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    for name in names:
        begin = time.monotonic()
        bench = Bench(device, quick, shared, ends_at, Report(name, folder))
        with bench.apart(name):
            known[name].run(bench)
        outcome = {"seconds": time.monotonic() - begin, "problems": bench.problems}
        (folder / f"{name}.outcome").write_text(json.dumps(outcome))


def free_gigabytes(folder: Path) -> float:
    """Of the disk."""
    return shutil.disk_usage(folder).free / 1e9
