"""Compiles numeric loops to machine code when they are first called, caches the code on disk, and lets the loops take
turns on one set of threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from threading import Lock
from typing import Any, TypeVar, cast

import numba
import torch
from numba import njit
from numba.core import caching

logger = logging.getLogger(__name__)

_NumbaCache: Any = caching.FunctionCache

Function = TypeVar("Function", bound=Callable[..., object])

# numba kills the process if two threads are in parallel loops at the same time.
_one_at_a_time = Lock()


def compiled(*, parallel: bool = False, divides_by_zero: bool = False) -> Callable[[Function], Function]:
    """Decorate a loop over arrays: machine code, run without the GIL.

    Numba caches the code in `NUMBA_CACHE_DIR`, else beside the source file, else in the user's cache folder. A folder
    that cannot be written, a full disk or a damaged file costs only the time to compile again. Numba looks for changes
    in the function's own file only, so a compiled function may call compiled functions of the same file only.

    Args:
        parallel: spread `prange` over threads. Call such a function within `parallel_loops` only.
        divides_by_zero: let a division by zero follow IEEE 754 instead of raising an exception, since the check for it
            prevents vectorized division.
    """
    compile_it = partial(njit, nogil=True, parallel=parallel, error_model="numpy" if divides_by_zero else "python")

    def decorate(function: Function) -> Function:
        dispatcher: Any = compile_it()(function)
        # Raised if none of the three folders can be written: then each process compiles anew.
        with suppress(RuntimeError):
            dispatcher._cache = _ForgivingCache(function)
        return cast(Function, dispatcher)

    return decorate


class _ForgivingCache(_NumbaCache):  # type: ignore[misc]  # numba has no annotations
    """Numba's cache on disk, except that its failures are logged instead of failing the call that compiles."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled code, or None if it is missing or damaged."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # With a damaged file, pickle and numba may raise anything.
            self._report("cannot read a compiled loop, compiling it anew", error)
            with suppress(OSError):
                self.flush()  # Otherwise the old index would prevent the new code from being saved.
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save the compiled code, if possible."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            self._report("cannot keep a compiled loop", error)
            self.disable()

    def _report(self, event: str, error: Exception) -> None:
        fields = {"folder": self.cache_path, "reason": repr(error)}
        logger.warning(event, extra={"fields": fields})


@contextmanager
def parallel_loops() -> Iterator[None]:
    """Enter to call functions that are compiled as parallel, with as many threads as torch; blocks until its turn."""
    with _one_at_a_time:
        config: Any = numba.config  # Its attributes are created at run time.
        # With numba's default, OpenMP, waiting threads spin on the cores that torch or a decoder needs.
        config.THREADING_LAYER = "workqueue"
        numba.set_num_threads(min(torch.get_num_threads(), config.NUMBA_NUM_THREADS))
        yield
