"""What a request costs besides the network, which decides how fast a device a server can keep busy:
`python -m benchmarks.host`. The model is a fake that takes no time, or exactly so many milliseconds a picture.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks._detectors import as_jpeg, example_picture
from benchmarks._measure import REPORTS, Cell, Report
from benchmarks._timed_server import MILLISECONDS
from benchmarks.serve import load, running

INSTANT = "A model that takes no time, 32 callers"
INSTANT_COLUMNS = [
    "picture",
    "masks",
    "answers/s",
    "server's CPU ms/answer",
    "of it in the process that serves HTTP",
    "load generator's CPU ms/answer",
]
TIMED = "A device that takes so long for each picture, batches of up to 8, 32 callers"
TIMED_COLUMNS = ["picture", "masks", "device ms/picture", "possible/s", "answers/s", "answers / possible"]
CALLERS = 32
SIZES = {"480p": (640, 480), "1080p": (1920, 1080)}
_TICKS = os.sysconf("SC_CLK_TCK")


def main(
    seconds: Annotated[float, typer.Option(help="How long each load lasts.")] = 5.0,
    device_ms: Annotated[str, typer.Option(help="Of the device, for each picture; separated by commas.")] = "16,8,4",
    quick: Annotated[bool, typer.Option(help="Half a second each: does it run?")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = REPORTS,
) -> None:
    """Print a table of what each answer costs, and one of how busy the server keeps a device."""
    report, seconds = Report("host", out), 0.5 if quick else seconds
    sizes = {"480p": SIZES["480p"]} if quick else SIZES
    instant: list[list[Cell]] = []
    timed: list[list[Cell]] = []
    for milliseconds in [0.0, 8.0] if quick else [0.0, *map(float, device_ms.split(","))]:
        settings = {MILLISECONDS: str(milliseconds), "ROISERVE_WORKERS": "1", "ROISERVE_MAX_QUEUE_SIZE": "256"}
        with running(["-m", "benchmarks._timed_server"], settings) as (target, pid):
            for name, size in sizes.items():
                jpeg = as_jpeg(example_picture(*size))
                for masks in ("none", "rle"):
                    path = f"/v1/detect?masks={masks}"
                    load(target, [jpeg], callers=CALLERS, seconds=seconds / 4, path=path)
                    before, own = _cpu_seconds(pid), time.process_time()
                    summary = load(target, [jpeg], callers=CALLERS, seconds=seconds, path=path)
                    after, rate = _cpu_seconds(pid), summary.throughput_per_second
                    if summary.error_rate > 0:
                        raise RuntimeError(f"{100 * summary.error_rate:.1f} % errors")
                    if milliseconds == 0:
                        spent = {process: after[process] - before[process] for process in before}
                        costs = [sum(spent.values()), spent[pid], time.process_time() - own]
                        instant.append([name, masks, rate, *(1e3 * one / summary.requests for one in costs)])
                        report.table(INSTANT, INSTANT_COLUMNS, instant)
                    else:
                        possible = 1e3 / milliseconds
                        timed.append([name, masks, milliseconds, possible, rate, rate / possible])
                        report.table(TIMED, TIMED_COLUMNS, timed)
    report.show()


def _cpu_seconds(server: int) -> dict[int, float]:
    """The processor time of a process and of all that descend from it."""
    ticks: dict[int, float] = {}
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue  # it has ended
        parents[int(folder.name)] = int(fields[1])
        ticks[int(folder.name)] = int(fields[11]) + int(fields[12])
    family = {server}
    while children := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= children
    return {pid: ticks[pid] / _TICKS for pid in family}


if __name__ == "__main__":
    typer.run(main)
