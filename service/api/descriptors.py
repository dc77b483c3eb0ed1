"""Reserves file descriptors: however many callers connect, enough remain for what the server itself has to open, such
as the socket of a new worker.
"""

from __future__ import annotations

import resource

# A sixteenth of the limit is left free, but at least this many. Starting a worker takes about ten.
_LEAST_SPARE = 16
# A higher limit is of no use, and some programs that inherit it close that many descriptors.
_MAX_LIMIT = 65_536


def raise_limit() -> None:
    """Raise the process's limit on open files, up to 65536, as far as is possible without privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_LIMIT if hard == resource.RLIM_INFINITY else min(hard, _MAX_LIMIT)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def is_spare(descriptor: int) -> bool:
    """Whether a descriptor that was just opened is one of those to leave free.

    The system assigns the lowest free number, so all below it are in use.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft != resource.RLIM_INFINITY and descriptor >= soft - max(_LEAST_SPARE, soft // 16)
