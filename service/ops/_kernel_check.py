"""Before our kernels are first used on a GPU they have to give the same answer as the CPU's."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from service.errors import first_line

logger = logging.getLogger(__name__)


def kernels_work(check: Callable[[], bool], *, device: torch.device, purpose: str, instead: str) -> bool:
    """Whether a check passes. If it does not, or fails, a warning says why.

    Args:
        check: runs the kernels on fixed numbers, and compares.
        purpose: what the kernels are for.
        instead: what takes their place.
    """
    try:
        problem = None if check() else "their answer is not the CPU's"
    except Exception as error:  # The type depends on what is missing.
        problem = first_line(error)
    if problem is not None:
        fields = {"device": str(device), "reason": problem}
        logger.warning(f"our kernels for {purpose} do not work: {instead}", extra={"fields": fields})
    return problem is None
