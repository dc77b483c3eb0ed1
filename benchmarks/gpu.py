"""Everything that has to be seen on a machine with a GPU, in one command of at most six minutes: `python -m
benchmarks.gpu`. Answers are compared with the CPU's, speeds with torchvision's; a server is measured over HTTP.

Sections run in processes of their own: those that compare answers beside each other, those that measure time alone.
What fails, hangs or crashes is reported with the end of its traceback, and the others go on. The tables of each section
are printed when it ends.
"""

from __future__ import annotations

import importlib.metadata
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import _gpu_answers, _gpu_server, _gpu_speed
from benchmarks._bench import ROOT, Outcome, Section, run_here, run_in_process
from benchmarks._measure import REPORTS, Cell, Report

# In the order of their worth, since the last ones are left out when the time is over. Sections of a tuple run at the
# same time.
STAGES: Sequence[tuple[Section, ...]] = (
    (Section("prepare", _gpu_answers.prepare, 60), Section("versions", _gpu_answers.versions, 60)),
    (
        Section("operators", _gpu_answers.operators, 90),
        Section("engines", _gpu_answers.engines, 110),
        Section("unload", _gpu_answers.unload, 90),
        Section("jpeg", _gpu_speed.jpeg, 60),
    ),
    (Section("speed", _gpu_speed.speed, 110),),
    (Section("http", _gpu_server.http, 120),),
    (Section("kernels", _gpu_speed.kernels, 30),),
    (Section("training", _gpu_speed.training, 40),),
    (Section("processes", _gpu_server.processes, 60),),
)
SECTIONS = {section.name: section for stage in STAGES for section in stage}
OUTCOMES = "Sections"
_COLUMNS = ["section", "outcome", "seconds"]
# A section that cannot even import torch in this time is not begun.
_LEAST_SECONDS = 15.0


def main(
    device: Annotated[str, typer.Option(help="cuda; cpu only shows that everything runs.")] = "cuda",
    seconds: Annotated[float, typer.Option(help="For all sections together; what is left then is left out.")] = 360,
    only: Annotated[
        str, typer.Option(help="Sections to run beside `prepare`, with commas between; all if empty.")
    ] = "",
    quick: Annotated[bool, typer.Option(help="Bundled models and tiny sizes: does it run?")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = REPORTS,
    sections: Annotated[str, typer.Option(hidden=True, help="Run these in this process.")] = "",
) -> None:
    """Print tables of versions, of differences from the CPU, of times and of loads; status 1 if anything failed."""
    if sections:
        run_here(SECTIONS, sections.split(","), device=device, quick=quick, seconds=seconds, folder=out)
        return
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no GPU that PyTorch can use; --device cpu --quick shows that everything runs")
    if unknown := set(filter(None, only.split(","))) - set(SECTIONS):
        raise SystemExit(f"expected sections of {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    if device == "cpu" and not quick:
        raise SystemExit("on the CPU only with --quick: benchmarks.model and benchmarks.serve measure it")
    ends_at = time.monotonic() + seconds
    _let_metadata_be_found()
    folder = out / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    report = Report("gpu", out)
    report.table(OUTCOMES, _COLUMNS, [])  # It stays the first one.
    outcomes: list[Outcome] = []
    for stage in _stages(only, quick=quick):
        run = partial(_run, device=device, quick=quick, ends_at=ends_at, folder=folder)
        with ThreadPoolExecutor(len(stage)) as threads:
            for ended in threads.map(run, stage):
                outcomes += ended
                _add(report, outcomes, ended)
    report.show([OUTCOMES])
    if any(outcome.problems for outcome in outcomes):
        raise SystemExit(1)


def _stages(only: str, *, quick: bool) -> list[list[list[Section]]]:
    """The stages one after the other; each is what runs at the same time; each of that is one process's sections."""
    wanted = {"prepare", *only.split(",")} if only else set(SECTIONS)
    if quick:  # Few processes: importing torch takes longer than most sections do.
        groups = [
            [section for section in SECTIONS.values() if (section.run.__module__ == _gpu_server.__name__) == serves]
            for serves in (False, True)
        ]
        stages = [[group] for group in groups]
    else:
        stages = [[[section] for section in stage] for stage in STAGES]
    chosen = [[[section for section in process if section.name in wanted] for process in stage] for stage in stages]
    return [[process for process in stage if process] for stage in chosen if any(stage)]


def _run(sections: list[Section], *, device: str, quick: bool, ends_at: float, folder: Path) -> list[Outcome]:
    left = ends_at - time.monotonic()
    if left < _LEAST_SECONDS:
        return [Outcome(section.name, None, []) for section in sections]
    seconds = min(left, sum(section.seconds for section in sections))
    return run_in_process(sections, module="benchmarks.gpu", device=device, quick=quick, seconds=seconds, folder=folder)


def _add(report: Report, outcomes: Sequence[Outcome], ended: Sequence[Outcome]) -> None:
    """Put what ended into the report, and print it at once: whoever stops this program keeps what it has found."""
    for outcome in ended:
        print(outcome, flush=True)
        for table in outcome.tables:
            report.table(*table)
        report.show([title for title, _, _ in outcome.tables])
    rows: list[list[Cell]] = [[one.section, one.words, "" if one.seconds is None else one.seconds] for one in outcomes]
    report.table(OUTCOMES, _COLUMNS, rows)


def _let_metadata_be_found() -> None:
    """Have the package's version known if it is not installed: it is on the path, but the server asks for its metadata,
    which setuptools writes beside the source.
    """
    try:
        importlib.metadata.version("roiserve")
    except importlib.metadata.PackageNotFoundError:
        write = "import setuptools; setuptools.setup()"
        subprocess.run([sys.executable, "-c", write, "-q", "egg_info"], cwd=ROOT, check=True)


if __name__ == "__main__":
    # Ctrl+C ends this process at once, and the sections with it; Python would wait for the threads that wait for them.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    typer.run(main)
