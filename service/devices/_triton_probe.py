"""The smallest kernel that shows whether Triton works."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_one(values):  # type: ignore[no-untyped-def]  # Triton's own
    """Add 1 to the value of each program."""
    place = values + tl.program_id(0)
    tl.store(place, tl.load(place) + 1)
