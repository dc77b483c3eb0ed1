"""The memory that is left: the machine's, and what the limits of control groups leave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from service.memory import available_bytes

MIB = 1024 * 1024
MACHINE = {"proc/meminfo": "MemTotal:       8388608 kB\nMemFree:         100 kB\nMemAvailable:    4194304 kB\n"}
V2 = MACHINE | {"proc/self/cgroup": "0::/service\n"}
V1 = MACHINE | {"proc/self/cgroup": "5:memory:/service\n3:cpu,cpuacct:/service\n"}


def group(folder: str, limit: object, used: int, inactive: int) -> dict[str, str]:
    """A group of version 2."""
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\nfile 9\ninactive_file {inactive}\n",
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MACHINE, 4096 * MIB),
        (V2 | group("sys/fs/cgroup/service", 1000 * MIB, 900 * MIB, 50 * MIB), 150 * MIB),
        (V2 | group("sys/fs/cgroup/service", "max", 900 * MIB, 0), 4096 * MIB),
        # The group above has less left.
        (
            V2
            | group("sys/fs/cgroup/service", 1000 * MIB, 100 * MIB, 0)
            | group("sys/fs/cgroup", 2000 * MIB, 1990 * MIB, 0),
            10 * MIB,
        ),
        (V2 | group("sys/fs/cgroup/service", 1000 * MIB, 1001 * MIB, 0), 0),
        (
            V1
            | {
                "sys/fs/cgroup/memory/service/memory.limit_in_bytes": str(500 * MIB),
                "sys/fs/cgroup/memory/service/memory.usage_in_bytes": str(300 * MIB),
                "sys/fs/cgroup/memory/service/memory.stat": f"inactive_file 1\ntotal_inactive_file {100 * MIB}\n",
            },
            300 * MIB,
        ),
    ],
)
def test_the_least_that_any_limit_leaves(files: Mapping[str, str], expected: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_bytes(root=tmp_path) == expected


def test_this_machine_has_some() -> None:
    left = available_bytes()
    assert left is not None
    assert left > 0
