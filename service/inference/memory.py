"""What a lack of memory looks like, and what can be done about it. Called by `predictor.py`; knows torch only."""

from __future__ import annotations

import gc

import torch

# The words of a RuntimeError that is a lack of memory: torch has a class of its own only for its CUDA allocator.
_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # Windows
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "bad_alloc",  # a C++ library that was called
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a network failed because there was not enough memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def release_memory() -> None:
    """Free what nobody uses: cycles of objects, and what CUDA's allocator keeps for later."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
