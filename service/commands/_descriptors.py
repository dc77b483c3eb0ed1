"""File descriptors: connections leave enough of them for what the server itself has to open, such as the socket of a
new worker, however many callers connect.
"""

from __future__ import annotations

import resource

# Left free: a sixteenth of the limit, but no fewer than that. To start a worker takes about ten.
_LEAST_SPARE = 16
# More is of no use, and some programs that inherit the limit close as many.
_MAX_LIMIT = 65_536


def raise_limit() -> None:
    """Raise the process's limit on open files as far as it may without privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_LIMIT if hard == resource.RLIM_INFINITY else min(hard, _MAX_LIMIT)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def is_spare(descriptor: int) -> bool:
    """Whether a descriptor that was just opened is one of those to be left free.

    The system gives the lowest number that is free, so all below it are in use.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft != resource.RLIM_INFINITY and descriptor >= soft - max(_LEAST_SPARE, soft // 16)
