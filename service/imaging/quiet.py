"""Keep decoders from writing to standard error: libtiff prints a line for every damaged row, and Pillow issues Python
warnings. Both would break JSON logs and let a client fill the disk. The lines are counted instead.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import PIL

_HANDLERS = ("TIFFSetErrorHandler", "TIFFSetWarningHandler")
# libtiff passes module, format and a va_list; the arguments are not touched.
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


@dataclass(slots=True)
class Complaints:
    """How many lines libtiff would have written."""

    count: int = 0


class _Thread(threading.local):
    complaints: Complaints | None = None


_thread = _Thread()


@contextmanager
def complaints_counted() -> Iterator[Complaints]:
    """Count libtiff's messages while this thread decodes. The first call silences libtiff permanently."""
    silence_decoders()
    _thread.complaints = complaints = Complaints()
    try:
        yield complaints
    finally:
        _thread.complaints = None


@functools.cache
def silence_decoders() -> bool:
    """Replace libtiff's message handlers in this process, once, and ignore Pillow's warnings.

    Returns:
        Whether the libtiff that Pillow uses was found; it may be linked statically into Pillow.
    """
    # Ignored warnings leave no entry in the modules' registries, which would grow with every new text.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    found = False
    for path in _libtiff_paths():
        try:
            library = ctypes.CDLL(str(path))
            for name in _HANDLERS:
                getattr(library, name)(_COUNTER)
            found = True
        except (OSError, AttributeError):
            continue
    return found


def _libtiff_paths() -> list[Path]:
    """Wheels ship their own copy beside the package; otherwise it is the system's."""
    package = Path(PIL.__file__).parent
    bundled = [*package.parent.glob("pillow.libs/libtiff*"), *package.glob(".dylibs/libtiff*")]
    return bundled or [Path("libtiff.so.6"), Path("libtiff.so.5"), Path("libtiff.dylib")]


def _count(module: int, text: int, arguments: int) -> None:
    if _thread.complaints is not None:
        _thread.complaints.count += 1


# libtiff keeps only the address, so this reference keeps the callback alive.
_COUNTER = _Handler(_count)
