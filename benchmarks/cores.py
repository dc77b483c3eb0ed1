"""How to divide many cores among workers: `python -m benchmarks.cores`.

First, the time of one picture on 1, 2, 4, … cores of this machine, each in a process that is bound to them; from the
first two follows which part of the time shrinks with the cores (Amdahl's law). Then, for machines that are not here, a
simulation of the pool: Poisson arrivals, the worker with the least work gets the next picture, and every worker has its
part of the cores.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks._measure import REPORTS, Cell, Report
from service.cores import Share, numa_nodes

MEASURED = "One picture on so many cores of this machine"
MEASURED_COLUMNS = ["model", "cores", "ms", "parallel part"]
SIMULATED = "Simulated workers that divide the cores"
SIMULATED_COLUMNS = ["cores", "workers", "threads each", "one picture ms", "at most/s", "p50 ms", "p99 ms"]
LOAD = 0.6  # of what the best division can do
_ROUNDS = 15


def main(
    model: Annotated[str, typer.Option(help="A bundled model.")] = "blood-cells",
    simulate_only: Annotated[bool, typer.Option(help="With --milliseconds and --parallel.")] = False,
    milliseconds: Annotated[float, typer.Option(help="Of one picture on one core, if it is not measured.")] = 60.0,
    parallel: Annotated[float, typer.Option(min=0, max=1, help="Part of it that shrinks with the cores.")] = 0.9,
    quick: Annotated[bool, typer.Option(help="Fewer pictures.")] = False,
    time_on: Annotated[str | None, typer.Option(hidden=True)] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = REPORTS,
) -> None:
    """Measure one picture on 1, 2, 4, … cores, then simulate 8 to 64 cores."""
    if time_on is not None:
        typer.echo(time_one(model, tuple(int(core) for core in time_on.split(","))))
        return
    report = Report("cores", out)
    if not simulate_only:
        milliseconds, parallel = measure(report, model)
    rows: list[list[Cell]] = []
    for cores in (8,) if quick else (8, 16, 32, 64):
        rows += simulate(cores, milliseconds / 1000, parallel, pictures=5_000 if quick else 100_000)
    report.table(SIMULATED, SIMULATED_COLUMNS, rows)
    report.show()


def measure(report: Report, model: str) -> tuple[float, float]:
    """Milliseconds on one core, and the part of them that shrinks; 0.9 where there is no second core."""
    [*cores] = numa_nodes()[0]
    counts = [2**exponent for exponent in range(len(cores).bit_length()) if 2**exponent <= len(cores)]
    rows: list[list[Cell]] = []
    alone, part = 0.0, 0.9
    for count in counts:
        chosen = ",".join(map(str, cores[:count]))
        command = [sys.executable, "-m", "benchmarks.cores", "--model", model, "--time-on", chosen]
        ms = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        if count == 1:
            alone = ms
        else:
            part = min(1.0, max(0.0, (1 - ms / alone) / (1 - 1 / count)))
        rows.append([model, count, ms, "" if count == 1 else f"{100 * part:.0f} %"])
    report.table(MEASURED, MEASURED_COLUMNS, rows)
    return alone, part


def time_one(model: str, cores: tuple[int, ...]) -> float:
    """The median milliseconds of one picture in a process that is bound to these cores."""
    Share(cores).bind()
    # Imported here: their threads must be started by a thread that is bound.
    import time

    import torch

    from benchmarks._detectors import bundled_models
    from service.inference.loading import load_predictor
    from service.inference.verification import fixed_pictures
    from service.structures import Image, Query

    torch.set_num_threads(len(cores))
    [stored] = [one for one in bundled_models() if one.name == model]
    predictor = load_predictor(stored, device="cpu")
    query = Query(Image(fixed_pictures()[0]))
    predictor.predict([query])
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        predictor.predict([query])
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def simulate(cores: int, seconds: float, parallel: float, *, pictures: int) -> list[list[Cell]]:
    """Every division of the cores into powers of two, all under the same load.

    Args:
        seconds: of one picture on one core.
        parallel: the part of it that shrinks with the number of threads.
    """
    divisions = [2**exponent for exponent in range(cores.bit_length())]
    service = {workers: seconds * (1 - parallel + parallel * workers / cores) for workers in divisions}
    rate = LOAD * max(workers / service[workers] for workers in divisions)
    return [
        [
            cores,
            workers,
            cores // workers,
            1000 * service[workers],
            workers / service[workers],
            *waiting(workers, service[workers], rate, pictures=pictures),
        ]
        for workers in divisions
    ]


def waiting(workers: int, seconds: float, rate: float, *, pictures: int) -> list[Cell]:
    """The median and the 99th percentile of the latency in ms, or dashes if the workers cannot keep up."""
    if rate * seconds >= workers:
        return ["–", "–"]
    chance = random.Random(0)
    free_at = [0.0] * workers
    now, latencies = 0.0, []
    for _ in range(pictures):
        now += chance.expovariate(rate)
        chosen = min(range(workers), key=free_at.__getitem__)
        free_at[chosen] = max(now, free_at[chosen]) + seconds * chance.uniform(0.75, 1.25)
        latencies.append(free_at[chosen] - now)
    latencies.sort()
    return [1000 * latencies[int(quantile * pictures)] for quantile in (0.5, 0.99)]


if __name__ == "__main__":
    typer.run(main)
