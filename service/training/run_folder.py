"""A folder in which a run keeps what it needs to resume, for one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from service.errors import ModelStoreError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder if it is missing, and keep other runs out of it.

    Raises:
        ModelStoreError: another run uses it, or it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ModelStoreError(f"{folder}: cannot be written: {error.strerror}") from error
    try:
        # Some network file systems have no locks; there, nothing keeps two runs apart.
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ModelStoreError(f"{folder}: another run is using it; wait until it ends, or stop it") from None
        yield
    finally:
        os.close(descriptor)
