"""The control groups of Linux, by which a container's share of the machine is limited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str, *, root: Path = Path("/")) -> Iterator[tuple[Path, bool]]:
    """The folders of the groups whose limits hold for this process, its own first, and whether each is of version 2.

    Args:
        controller: its name in version 1, such as `cpu` or `memory`.
        root: where `proc` and `sys` are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux, or no /proc
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount = mounts
        elif controller in controllers.split(","):
            names = (controllers, controller)
            mount = next((mounts / name for name in names if (mounts / name).is_dir()), mounts / controller)
        else:
            continue
        # In a container without a namespace of its own, the path is the host's and does not exist here; the mount's
        # root is then the container's group.
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder, not controllers
            if folder == mount:
                break
