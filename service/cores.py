"""How many CPU cores this process may use: what its affinity allows and its control group's quota leaves, which in a
container is less than what the machine has. Threads beyond that number only throttle one another.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def available_cores(*, root: Path = Path("/")) -> int:
    """The number of threads that can run at once, at least 1. A quota of 1.5 cores counts as 2.

    Args:
        root: where `proc` and `sys` lie.
    """
    return min(len(os.sched_getaffinity(0)), *(max(1, math.ceil(quota)) for quota in _quotas(root)), 2**31)


def _quotas(root: Path) -> Iterator[float]:
    """The quotas in cores that hold for this process: of its control group and of those above, in version 2 or 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux, or no /proc
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            read, mount = _quota_v2, mounts
        elif "cpu" in controllers.split(","):
            read = _quota_v1
            mount = next((mounts / name for name in (controllers, "cpu") if (mounts / name).is_dir()), mounts / "cpu")
        else:
            continue
        # In a container without a namespace of its own, the path is the host's and does not exist here; the mount's
        # root is then the container's group.
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if (quota := read(folder)) is not None:
                yield quota
            if folder == mount:
                break


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
