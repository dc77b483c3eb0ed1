from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.cores import available_cores
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
