"""How every benchmark measures and prints: the sides take turns in one run, so that whatever else the machine does
falls on all of them; medians with quartiles; memory as the operating system saw it.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("roiserve", "torch", "torchvision", "numba", "numpy", "pycocotools")


@dataclass(frozen=True)
class Spread:
    """The median of some numbers and the quartiles around it."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} – {self.high:.3g})"


def spread(numbers: list[float]) -> Spread:
    return Spread(*statistics.quantiles(numbers, n=4, method="inclusive"))


def alternate(
    sides: Mapping[str, Callable[[], object]], *, rounds: int, most_seconds: float = 60.0
) -> dict[str, list[float]]:
    """Time each side once a round, in turn.

    Args:
        sides: what to call, by name. Each is called once before the first round.
        rounds: how many; fewer, but at least three, once `most_seconds` have passed.

    Returns:
        The seconds of each side's calls, round by round.
    """
    for call in sides.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > most_seconds:
            break
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def milliseconds(seconds: list[float]) -> Spread:
    return spread([1e3 * one for one in seconds])


def ratio(slow: list[float], fast: list[float]) -> Spread:
    """How many times faster, round by round."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def peak_memory_bytes(call: Callable[[], object]) -> int:
    """How far the process's resident memory rose above its present size while `call` ran (Linux with glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # Else memory that earlier calls freed would be used again, uncounted.
    Path("/proc/self/clear_refs").write_text("5")  # The high-water mark begins anew.
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def available_memory_bytes() -> int:
    return _kibibytes("/proc/meminfo", "MemAvailable")


def print_table(title: str, columns: list[str], rows: list[list[object]]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=160).print(table)


def print_machine() -> None:
    """What the figures were measured on and with, and the command that repeats them."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"machine: {_processor()}, torch on {torch.get_num_threads()} threads, {platform.platform()}")
    print(f"versions: Python {platform.python_version()}, {versions}")
    print(f"command: python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".rstrip())


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _status_bytes(name: str) -> int:
    return _kibibytes("/proc/self/status", name)


def _kibibytes(file: str, name: str) -> int:
    [line] = [line for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])
