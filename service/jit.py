"""Compile numeric loops to machine code when they are first called, keep the result on disk, and share threads among
them. Called by the rooms that loop over pixels or boxes (`masks`, `ops`); knows nothing of what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any, TypeVar, cast

import numba
import torch
from numba import njit

Function = TypeVar("Function", bound=Callable[..., object])

# Every model has a thread of its own, and numba ends the process when two threads are in parallel loops at once.
_one_at_a_time = Lock()


def compiled(*, parallel: bool = False, divides_by_zero: bool = False) -> Callable[[Function], Function]:
    """Decorate a loop over arrays: machine code, run without the GIL.

    Numba keeps the code in `NUMBA_CACHE_DIR`, else beside the source file, else in the user's cache folder. It looks
    for changes in the function's own file only, so a compiled function calls compiled functions of that file alone.

    Args:
        parallel: share `prange` among threads. Called within `parallel_loops` only.
        divides_by_zero: let a division by zero give what IEEE 754 says instead of an exception, whose check would keep
            the processor from dividing many numbers at once.
    """
    compile_it = partial(njit, nogil=True, parallel=parallel, error_model="numpy" if divides_by_zero else "python")

    def decorate(function: Function) -> Function:
        try:
            return cast(Function, compile_it(cache=True)(function))
        except RuntimeError:  # None of the three folders can be written: compile anew in each process.
            return cast(Function, compile_it()(function))

    return decorate


@contextmanager
def parallel_loops() -> Iterator[None]:
    """Enter to call functions that are compiled as parallel, with as many threads as torch; waits for its turn."""
    with _one_at_a_time:
        config: Any = numba.config  # It gets its attributes at run time.
        # numba's default, OpenMP, keeps waiting threads spinning on the cores that torch or a decoder needs.
        config.THREADING_LAYER = "workqueue"
        numba.set_num_threads(min(torch.get_num_threads(), config.NUMBA_NUM_THREADS))
        yield
