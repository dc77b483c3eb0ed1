"""Compile numeric loops to machine code when they are first called, keep the result on disk, and share threads among
them.
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

# numba ends the process when two threads are in parallel loops at once.
_one_at_a_time = Lock()


def compiled(*, parallel: bool = False, divides_by_zero: bool = False) -> Callable[[Function], Function]:
    """Decorate a loop over arrays: machine code, run without the GIL.

    Numba keeps the code in `NUMBA_CACHE_DIR`, else beside the source file, else in the user's cache folder. A folder
    that cannot be written, a full disk or a damaged file costs the time to compile, nothing else. Numba looks for
    changes in the function's own file only, so a compiled function calls compiled functions of that file alone.

    Args:
        parallel: share `prange` among threads. Called within `parallel_loops` only.
        divides_by_zero: let a division by zero give what IEEE 754 says instead of an exception, whose check would keep
            the processor from dividing many numbers at once.
    """
    compile_it = partial(njit, nogil=True, parallel=parallel, error_model="numpy" if divides_by_zero else "python")

    def decorate(function: Function) -> Function:
        dispatcher: Any = compile_it()(function)
        # None of the three folders can be written: compile anew in each process.
        with suppress(RuntimeError):
            dispatcher._cache = _ForgivingCache(function)
        return cast(Function, dispatcher)

    return decorate


class _ForgivingCache(_NumbaCache):  # type: ignore[misc]  # numba has no annotations
    """Numba's own cache on disk, whose failures end the call that compiles."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled code, or None if it is not there or not whole."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # A damaged file makes pickle and numba raise whatever they like.
            self._report("cannot read a compiled loop, compiling it anew", error)
            with suppress(OSError):
                self.flush()  # The index would keep the new code from being kept.
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the compiled code, if that is possible."""
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
    """Enter to call functions that are compiled as parallel, with as many threads as torch; waits for its turn."""
    with _one_at_a_time:
        config: Any = numba.config  # It gets its attributes at run time.
        # numba's default, OpenMP, keeps waiting threads spinning on the cores that torch or a decoder needs.
        config.THREADING_LAYER = "workqueue"
        numba.set_num_threads(min(torch.get_num_threads(), config.NUMBA_NUM_THREADS))
        yield
