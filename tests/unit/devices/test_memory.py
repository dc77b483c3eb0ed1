"""A lack of memory is known by its class or by its words, and memory that nobody uses is given back."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from service.devices.cpu import CpuDevice
from service.devices.cuda import CudaDevice

ON_CPU = RuntimeError(
    "Exception from src/inference/src/cpp/infer_request.cpp:224:\nCheck 'ptr' failed at cpu_memory.cpp:257:\n"
    "Failed to allocate 603979776 bytes of memory"
)
CPU, CUDA = CpuDevice("cpu"), CudaDevice("cuda:0")

ON_ANY = [
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 1125899906842624 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("std::bad_alloc"),
]
ON_CUDA = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]


@pytest.mark.parametrize("error", [*ON_ANY, *ON_CUDA], ids=lambda error: f"{type(error).__name__} {str(error)[-40:]}")
def test_lack_of_memory_is_known(error: Exception) -> None:
    assert CUDA.is_out_of_memory(error)
    if error in ON_ANY:
        assert CPU.is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
        ValueError("out of memory"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_other_failures_are_not_taken_for_it(error: Exception) -> None:
    assert not CUDA.is_out_of_memory(error)
    assert not CPU.is_out_of_memory(error)


def test_lack_of_memory_in_openvino_is_known() -> None:
    assert CPU.is_out_of_memory(ON_CPU)


def test_what_torch_really_says_is_known() -> None:
    with pytest.raises(RuntimeError) as refusal:
        torch.empty(2**52, dtype=torch.uint8)
    assert CPU.is_out_of_memory(refusal.value)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])
def test_cycles_of_objects_are_freed(device: CpuDevice | CudaDevice) -> None:
    class Node:
        pass

    node = Node()
    node.itself = node  # type: ignore[attr-defined]  # a cycle, which only the collector frees
    known = weakref.ref(node)
    gc.disable()
    try:
        del node
        device.release_memory()
        assert known() is None
    finally:
        gc.enable()
