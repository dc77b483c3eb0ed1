import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from service.errors import ModelStoreError
from service.model_store.files import check_safetensors
from service.model_store.weights import load_into, load_weights, save_weights


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


def state_dict() -> dict[str, Tensor]:
    return {"conv.weight": torch.tensor([1.0, 2.0001, -3.0]), "bn.num_batches_tracked": torch.tensor(7)}


def detector_like(*, num_classes: int = 3) -> nn.Module:
    """The keys of a detector that the messages look at: a batch norm and `roi_heads.box_predictor.cls_score`."""
    box_predictor = nn.ModuleDict({"cls_score": nn.Linear(4, num_classes)})
    return nn.ModuleDict({"bn": nn.BatchNorm2d(2), "roi_heads": nn.ModuleDict({"box_predictor": box_predictor})})


def test_float32_comes_back_bit_for_bit_with_integers_kept(path: Path) -> None:
    sha256 = save_weights(path, state_dict(), dtype="float32")
    loaded = load_weights(path, sha256)
    assert loaded["conv.weight"].equal(state_dict()["conv.weight"])
    assert loaded["bn.num_batches_tracked"].equal(torch.tensor(7))
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_half_precision_is_rounded_on_disk_and_float32_in_memory(path: Path) -> None:
    loaded = load_weights(path, save_weights(path, state_dict(), dtype="float16"))
    assert loaded["conv.weight"].dtype == torch.float32
    # 2.0001 lies between the halves 2 and 2 + 2**-9.
    assert loaded["conv.weight"].tolist() == [1.0, 2.0, -3.0]


def test_tensors_that_share_memory_are_stored_each(path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    loaded = load_weights(path, save_weights(path, {"a": shared, "b": shared.t()}))
    assert loaded["b"].equal(shared.t())


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (70_000.0, "float16")])
def test_weights_that_would_be_stored_as_nan_or_infinity_are_refused_by_name(
    path: Path, value: float, dtype: str
) -> None:
    with pytest.raises(ModelStoreError, match=f"finite weights that fit {dtype}, got others in head.bias"):
        save_weights(path, {"head.bias": torch.tensor([value])}, dtype=dtype)  # type: ignore[arg-type]  # parametrised
    assert not path.exists()


def test_changed_weights_are_refused_by_their_hash(path: Path) -> None:
    sha256 = save_weights(path, state_dict())
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelStoreError, match=f"was changed: expected sha256 {sha256}, got [0-9a-f]{{64}}"):
        load_weights(path, sha256)


def test_truncated_weights_are_called_truncated(path: Path) -> None:
    sha256 = save_weights(path, state_dict())
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelStoreError, match=f"truncated: expected {size} bytes, got {size - 3}"):
        load_weights(path, sha256)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file"),
        (b"PK\x03\x04 a zip archive", "what looks like a PyTorch checkpoint"),
        (pickle.dumps({"a": 1}, protocol=2), "what looks like a PyTorch checkpoint"),
        (b"a text, longer than eight bytes", "something else"),
        ((4).to_bytes(8, "little") + b"[1] ", "something else"),
        ((10**12).to_bytes(8, "little") + b"{}", "something else"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "something else"),
    ],
)
def test_what_is_no_safetensors_file_is_said_to_be_none(path: Path, content: bytes, kind: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ModelStoreError, match=f"expected a safetensors file, got {kind}"):
        load_weights(path, "0" * 64)


def test_a_header_that_lies_about_its_tensors_is_refused(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}).encode()
    content = len(header).to_bytes(8, "little") + header + b"\x00" * 4
    path.write_bytes(content)
    check_safetensors(path)
    with pytest.raises(ModelStoreError, match="not valid safetensors"):
        load_weights(path, hashlib.sha256(content).hexdigest())


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(ModelStoreError, match="no such file"):
        load_weights(path, "0" * 64)


def test_weights_that_fit_are_loaded() -> None:
    model, other = detector_like(), detector_like()
    load_into(model, other.state_dict(), source="here")
    assert all(tensor.equal(other.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_batch_counters_are_neither_required_nor_surplus() -> None:
    weights = detector_like().state_dict()
    weights["bn2.num_batches_tracked"] = weights.pop("bn.num_batches_tracked")
    load_into(detector_like(), weights, source="here")


def test_missing_surplus_and_misshapen_weights_are_listed_key_by_key_and_nothing_is_loaded() -> None:
    model, weights = detector_like(), detector_like().state_dict()
    weights["bn.weigth"] = weights.pop("bn.weight")
    weights["bn.bias"] = torch.full((3,), 5.0)
    with pytest.raises(ModelStoreError) as caught:
        load_into(model, weights, source="there.pth")
    assert str(caught.value).splitlines() == [
        "there.pth: the weights do not fit the network",
        "  missing: bn.weight",
        "  surplus: bn.weigth",
        "  other shape: bn.bias (expected (2,), got (3,))",
    ]
    assert model.state_dict()["bn.bias"].tolist() == [0.0, 0.0]


def test_a_wrong_class_count_is_said_in_words() -> None:
    with pytest.raises(ModelStoreError, match="expected weights for 2 labels and the background, got 90 and"):
        load_into(detector_like(num_classes=3), detector_like(num_classes=91).state_dict(), source="here")


def test_a_long_list_of_keys_is_cut_with_their_number() -> None:
    surplus = {f"extra.{number:02}": torch.zeros(1) for number in range(30)}
    with pytest.raises(ModelStoreError, match=r"extra\.19 and 10 more"):
        load_into(detector_like(), {**detector_like().state_dict(), **surplus}, source="here")
