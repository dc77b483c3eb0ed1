"""How much memory this process may still take: what the machine has free and its control group's limit leaves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from service.control_groups import control_groups


def available_bytes(*, root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping or being killed; None where the system does not say.

    Args:
        root: where `proc` and `sys` are.
    """
    return min(_available(root), default=None)


def _available(root: Path) -> Iterator[int]:
    with suppress(OSError):
        for free in re.findall(r"^MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE):
            yield int(free) * 1024
    for folder, is_v2 in control_groups("memory", root=root):
        limit, used, cache = (
            ("memory.max", "memory.current", "inactive_file")
            if is_v2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        with suppress(OSError, ValueError):  # no such controller, or a limit of "max"
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            reclaimable = re.findall(rf"^{cache} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
            yield max(0, left + sum(map(int, reclaimable)))
