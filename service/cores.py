"""How many CPU cores this process may use: what its affinity allows and its control group's quota leaves, which in a
container is less than what the machine has. Threads beyond that number only throttle one another. And how several
processes divide the cores, so that none works across NUMA nodes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from service.control_groups import control_groups

Binding = Literal["node", "cores", "off"]
"""What each of several processes is bound to: the cores of a NUMA node, cores of its own, or nothing."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one of several processes gets of the CPU.

    Attributes:
        cores: those that it is bound to; None for all that it may use.
        sharers: how many of the processes share them, itself included.
    """

    cores: tuple[int, ...] | None = None
    sharers: int = 1

    def bind(self) -> None:
        """Bind all threads of this process, and so those that they will start."""
        if self.cores is None:
            return
        for task in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(task.name), self.cores)


def divide_cores(processes: int, binding: Binding, *, root: Path = Path("/")) -> Sequence[Share]:
    """A share for each of several processes that do the same work.

    Nothing is bound where it could only do harm: a single process; under a quota, which belongs to no core in
    particular; with fewer processes than nodes, since some cores would be left over; and with more than cores.

    Args:
        root: where `proc` and `sys` are.
    """
    nodes = numa_nodes(root=root)
    cores = sum(map(len, nodes))
    is_bound = binding == "cores" or (binding == "node" and len(nodes) > 1)
    if not (is_bound and processes > 1 and len(nodes) <= processes <= cores == available_cores(root=root)):
        return [Share(sharers=processes)] * processes
    # One for each node, then the next where it gets most.
    counts = [1] * len(nodes)
    for _ in range(processes - len(nodes)):
        counts[max(range(len(nodes)), key=lambda node: len(nodes[node]) / (counts[node] + 1))] += 1
    if binding == "node":
        return [Share(node, count) for node, count in zip(nodes, counts, strict=True) for _ in range(count)]
    return [Share(part) for node, count in zip(nodes, counts, strict=True) for part in _parts(node, count)]


def _parts(cores: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    bounds = [len(cores) * part // count for part in range(count + 1)]
    yield from (tuple(cores[start:end]) for start, end in pairwise(bounds))


def numa_nodes(*, root: Path = Path("/")) -> Sequence[tuple[int, ...]]:
    """The cores of each NUMA node that this process may use, nodes without any left out. Hardware threads of one core
    stand side by side.

    Args:
        root: where `sys` is.
    """
    allowed = os.sched_getaffinity(0)
    system = root / "sys/devices/system"
    files = sorted(system.glob("node/node[0-9]*/cpulist"), key=lambda file: int(file.parent.name.removeprefix("node")))
    nodes = [_core_list(file) & allowed for file in files]
    if set().union(*nodes) != allowed:  # no NUMA, or no /sys
        nodes = [set(allowed)]

    def place(core: int) -> tuple[int, int]:
        siblings = _core_list(system / f"cpu/cpu{core}/topology/thread_siblings_list")
        return min(siblings, default=core), core

    return [tuple(sorted(node, key=place)) for node in nodes if node]


def _core_list(file: Path) -> set[int]:
    """The numbers in a list such as `0-3,8`; none if the file cannot be read."""
    try:
        parts = [part.split("-") for part in file.read_text().strip().split(",") if part]
        return {core for part in parts for core in range(int(part[0]), int(part[-1]) + 1)}
    except (OSError, ValueError):
        return set()


def available_cores(*, root: Path = Path("/")) -> int:
    """The number of threads that can run at once, at least 1. A quota of 1.5 cores counts as 2.

    Args:
        root: where `proc` and `sys` are.
    """
    return min(len(os.sched_getaffinity(0)), *(max(1, math.ceil(quota)) for quota in _quotas(root)), 2**31)


def _quotas(root: Path) -> Iterator[float]:
    """The quotas in cores that hold for this process: of its control group and of those above, in version 2 or 1."""
    for folder, is_v2 in control_groups("cpu", root=root):
        if (quota := (_quota_v2 if is_v2 else _quota_v1)(folder)) is not None:
            yield quota


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return quota / int((folder / "cpu.cfs_period_us").read_text()) if quota > 0 else None
    except (OSError, ValueError):
        return None
