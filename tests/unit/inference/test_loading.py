"""What a predictor is loaded with when the settings leave it to us."""

from __future__ import annotations

import pytest

from service.devices.cpu import CpuDevice
from service.devices.cuda import CudaDevice
from service.inference.loading import choose_precision


@pytest.mark.parametrize(
    ("precision", "engine", "device", "chosen"),
    [
        ("auto", "auto", "cpu", "float32"),
        ("auto", "auto", "cuda:0", "float16"),
        ("auto", "compiled", "cuda:1", "float16"),
        ("auto", "eager", "cuda:0", "float32"),
        ("bfloat16", "auto", "cuda:0", "bfloat16"),
    ],
)
def test_auto_is_half_precision_on_cuda_but_for_the_reference(
    precision: str, engine: str, device: str, chosen: str
) -> None:
    assert (
        choose_precision(
            precision, engine=engine, device=CudaDevice(device) if device.startswith("cuda") else CpuDevice(device)
        )
        == chosen
    )
