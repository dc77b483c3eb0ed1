from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from service.cores import Binding, Share, available_cores, divide_cores, numa_nodes
from service.settings import Settings

FILES = {
    "none": {},
    "v2, unlimited": {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"},
    "v2, half a core": {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"},
    "v2, one and a half": {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
    "v2, a group above has less": {
        "proc/self/cgroup": "0::/kubepods/pod/container\n",
        "sys/fs/cgroup/kubepods/pod/container/cpu.max": "max 100000\n",
        "sys/fs/cgroup/kubepods/pod/cpu.max": "100000 100000\n",
        "sys/fs/cgroup/kubepods/cpu.max": "900000 100000\n",
    },
    "v2, the host's path": {"proc/self/cgroup": "0::/docker/0123\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"},
    "v1": {
        "proc/self/cgroup": "4:memory:/docker/0123\n3:cpu,cpuacct:/docker/0123\n0::/\n",
        "sys/fs/cgroup/cpu,cpuacct/docker/0123/cpu.cfs_quota_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/docker/0123/cpu.cfs_period_us": "100000\n",
    },
    "v1, unlimited, in its own namespace": {
        "proc/self/cgroup": "3:cpu:/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    },
    "nonsense": {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "many\n"},
}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ("none", 8),
        ("v2, unlimited", 8),
        ("v2, half a core", 1),
        ("v2, one and a half", 2),
        ("v2, a group above has less", 1),
        ("v2, the host's path", 1),
        ("v1", 1),
        ("v1, unlimited, in its own namespace", 8),
        ("nonsense", 8),
    ],
)
def test_quota_of_the_control_group_bounds_the_cores(
    files: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name, text in FILES[files].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cores(root=tmp_path) == cores


def test_affinity_bounds_the_cores_and_the_decoding_threads() -> None:
    [core, *_] = before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {core})
        assert available_cores() == 1
        assert Settings().decode_threads == 1
    finally:
        os.sched_setaffinity(0, before)


MACHINES = {
    "one node": {"node/node0/cpulist": "0-7\n"},
    "two nodes of two hardware threads a core": {
        "node/node0/cpulist": "0-1,4-5\n",
        "node/node1/cpulist": "2-3,6-7\n",
        **{f"cpu/cpu{core}/topology/thread_siblings_list": f"{core % 4},{core % 4 + 4}\n" for core in range(8)},
    },
    "unequal nodes": {"node/node0/cpulist": "0-1\n", "node/node1/cpulist": "2-7\n"},
    "memory without cores": {"node/node0/cpulist": "0-7\n", "node/node1/cpulist": "\n"},
    "other cores than ours": {
        "node/node0/cpulist": "0-3\n",
        "node/node10/cpulist": "8-9\n",
        "node/node2/cpulist": "4-7\n",
    },
    "unreadable": {"node/node0/cpulist": "all\n"},
    "no /sys": {},
}
ALL = tuple(range(8))
NODES: dict[str, list[tuple[int, ...]]] = {
    "one node": [ALL],
    "two nodes of two hardware threads a core": [(0, 4, 1, 5), (2, 6, 3, 7)],
    "unequal nodes": [(0, 1), (2, 3, 4, 5, 6, 7)],
    "memory without cores": [ALL],
    "other cores than ours": [(0, 1, 2, 3), (4, 5, 6, 7)],
    "unreadable": [ALL],
    "no /sys": [ALL],
}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def make(name: str, *, quota: int | None = None) -> Path:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
        files = {f"sys/devices/system/{path}": text for path, text in MACHINES[name].items()}
        if quota is not None:
            files |= {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota}00000 100000\n"}
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return tmp_path

    return make


@pytest.mark.parametrize("name", MACHINES)
def test_nodes_are_those_that_the_system_tells_of(name: str, machine: Callable[..., Path]) -> None:
    assert numa_nodes(root=machine(name)) == NODES[name]


@pytest.mark.parametrize(
    ("name", "processes", "binding", "shares"),
    [
        ("one node", 1, "cores", [Share()]),
        ("one node", 3, "node", [Share(sharers=3)] * 3),
        ("one node", 3, "cores", [Share((0, 1)), Share((2, 3, 4)), Share((5, 6, 7))]),
        ("one node", 9, "cores", [Share(sharers=9)] * 9),
        ("two nodes of two hardware threads a core", 1, "node", [Share()]),
        ("two nodes of two hardware threads a core", 2, "node", [Share((0, 4, 1, 5)), Share((2, 6, 3, 7))]),
        ("two nodes of two hardware threads a core", 2, "off", [Share(sharers=2)] * 2),
        (
            "two nodes of two hardware threads a core",
            3,
            "node",
            [Share((0, 4, 1, 5), 2), Share((0, 4, 1, 5), 2), Share((2, 6, 3, 7))],
        ),
        (
            "two nodes of two hardware threads a core",
            4,
            "cores",
            [Share((0, 4)), Share((1, 5)), Share((2, 6)), Share((3, 7))],
        ),
        ("unequal nodes", 4, "node", [Share((0, 1)), *[Share((2, 3, 4, 5, 6, 7), 3)] * 3]),
    ],
)
def test_processes_divide_the_cores_and_keep_to_a_node(
    name: str, processes: int, binding: Binding, shares: list[Share], machine: Callable[..., Path]
) -> None:
    assert list(divide_cores(processes, binding, root=machine(name))) == shares


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("binding", get_args(Binding))
def test_every_process_gets_a_part_and_every_core_a_process(
    binding: Binding, name: str, machine: Callable[..., Path]
) -> None:
    root = machine(name)
    for processes in range(1, 12):
        shares = divide_cores(processes, binding, root=root)
        assert len(shares) == processes
        assert {core for share in shares for core in share.cores or ALL} == set(ALL)
        for share in shares:
            assert sum(other.cores == share.cores for other in shares) == share.sharers


def test_a_quota_belongs_to_no_core(machine: Callable[..., Path]) -> None:
    root = machine("two nodes of two hardware threads a core", quota=4)
    assert divide_cores(2, "cores", root=root) == [Share(sharers=2)] * 2


def test_binding_holds_for_running_threads_and_later_ones() -> None:
    program = (
        "import os, threading\n"
        "from service.cores import Share\n"
        "core = max(os.sched_getaffinity(0))\n"
        "bound, seen = threading.Event(), []\n"
        "def look(): bound.wait(); seen.append(os.sched_getaffinity(0))\n"
        "early = threading.Thread(target=look); early.start()\n"
        "Share((core,)).bind(); bound.set(); early.join()\n"
        "late = threading.Thread(target=look); late.start(); late.join()\n"
        "print(seen == [{core}] * 2)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"
