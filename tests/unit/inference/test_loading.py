"""What a predictor is loaded with when the settings leave it to us."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.devices.cpu import CpuDevice
from service.devices.cuda import CudaDevice
from service.errors import ModelStoreError
from service.inference.loading import choose_precision, load_predictor
from service.model_store.store import StoredModel
from tests.tiny_models import given_proposals, store_untrained


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
    target = CpuDevice(device) if device == "cpu" else CudaDevice(device)
    assert choose_precision(precision, engine=engine, device=target) == chosen


def test_a_network_far_larger_than_its_weights_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    """4096 channels, a patch of 64 x 64 and 4096 hidden values are all in range, and 275 GB together."""
    stored = store_untrained(tmp_path, "small", given_proposals("fast_rcnn"))
    text = (stored.path / "model.toml").read_text()
    for key, value in (("out_channels", 4096), ("box_output_size", 64), ("box_head_channels", 4096)):
        text, replaced = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert replaced == 1
    (stored.path / "model.toml").write_text(text)
    with pytest.raises(ModelStoreError, match=r"the weights do not fit the network\n  other shape: "):
        load_predictor(StoredModel("small", 1, stored.path), device="cpu", engine="eager")
