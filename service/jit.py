"""Compile numeric loops to machine code when they are first called, and keep the result on disk.
Called by the rooms that loop over pixels or boxes (`masks`, `ops`); knows nothing of what they compute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(*, parallel: bool = False, divides_by_zero: bool = False) -> Callable[[Function], Function]:
    """Decorate a loop over arrays: machine code, run without the GIL.

    Numba keeps the code in `NUMBA_CACHE_DIR`, else beside the source file, else in the user's cache folder. It looks
    for changes in the function's own file only, so a compiled function calls compiled functions of that file alone.

    Args:
        parallel: share `prange` among threads. The caller sees to it that two threads are never inside such functions
            at once: numba's threading layer `workqueue` ends the process then.
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
