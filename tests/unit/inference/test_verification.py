"""A predictor proves itself as it warms up: held to the plain network on two pictures, it passes, is replaced or is
refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from service.devices.cpu import CpuDevice
from service.errors import ModelStoreError, ServiceError
from service.inference.engines import choosing
from service.inference.engines.compiled import CompiledNetwork
from service.inference.half import HalfNetwork
from service.inference.loading import load_predictor
from service.inference.predictor import Predictor
from service.inference.verification import SIZE, fixed_pictures
from service.model_store.store import StoredModel
from service.modeling.parts import Parts, TrunkOutput
from service.structures import NOT_FINITE
from tests.tiny_models import given_proposals, store_untrained
from tests.unit.inference.engines.networks import FAMILIES

FAMILY = "fpn with masks"


def test_pictures_are_always_the_same_and_not_flat() -> None:
    first, second = fixed_pictures()
    again, _ = fixed_pictures()
    assert first.shape == second.shape == (*SIZE, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert min(first.std(), second.std()) > 30


@pytest.mark.parametrize("family", FAMILIES)
def test_openvino_passes_with_every_family(family: str, store: Any, cache_dir: Path) -> None:
    pytest.importorskip("openvino")
    predictor = load_predictor(store(family), device="cpu", engine="openvino", cache_dir=cache_dir)
    predictor.warm_up()
    verification = predictor.info.verification
    assert verification is not None
    assert verification.has_passed, str(verification)
    assert (verification.engine, verification.precision) == ("openvino", "float32")
    assert set(verification.values) == {"boxes", "scores"} | ({"masks"} if predictor.info.has_masks else set())
    assert max(one.difference for one in verification.values.values()) > 0
    assert verification.seconds > 0


@pytest.mark.parametrize("family", [FAMILY, "fast r-cnn"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_passes_within_its_own_tolerance(family: str, precision: str, store: Any) -> None:
    predictor = load_predictor(store(family), device="cpu", engine="eager", precision=precision)
    predictor.warm_up()
    verification = predictor.info.verification
    assert verification is not None
    assert verification.has_passed, str(verification)
    assert verification.values["scores"].difference > 1e-4  # it does compute in another format


def test_r_cnn_is_verified_in_half_precision_too(tmp_path: Path) -> None:
    stored = store_untrained(tmp_path, "crops", given_proposals("rcnn"))
    predictor = load_predictor(stored, device="cpu", precision="bfloat16")
    predictor.warm_up()
    assert predictor.info.verification is not None
    assert predictor.info.verification.has_passed


def test_eager_in_float32_is_what_others_are_held_to(store: Any) -> None:
    predictor = load_predictor(store(FAMILY), device="cpu", engine="eager")
    predictor.warm_up()
    assert predictor.info.verification is None


def spoilt(change: Callable[[Parts], Parts]) -> Any:
    """The engine `compiled` without code generation, and with something wrong."""

    class Spoilt(CompiledNetwork):
        def __init__(self, model: Any) -> None:
            super().__init__(model, backend="eager")

        def parts(self) -> Parts:
            return change(super().parts())

    return patch.multiple(choosing, CompiledNetwork=Spoilt)


def scores_off_by_a_little(parts: Parts) -> Parts:
    def box_head(pooled: Tensor) -> tuple[Tensor, Tensor]:
        class_logits, box_regression = parts.box_head(pooled)
        return class_logits * 1.01, box_regression

    return Parts(parts.trunk, parts.backbone, box_head, parts.mask_head)


def deltas_of_the_first_image_for_all(parts: Parts) -> Parts:
    def trunk(batch: Tensor) -> TrunkOutput:
        output = parts.trunk(batch)
        return TrunkOutput(output.features, output.objectness, output.deltas[:1].expand_as(output.deltas))

    return Parts(trunk, parts.backbone, parts.box_head, parts.mask_head)


def masks_of_nan(parts: Parts) -> Parts:
    def mask_head(pooled: Tensor, labels: Tensor) -> Tensor:
        assert parts.mask_head is not None
        return parts.mask_head(pooled, labels) * float("nan")

    return Parts(parts.trunk, parts.backbone, parts.box_head, mask_head)


def load_by_compiled(stored: StoredModel, change: Callable[[Parts], Parts], **options: Any) -> Predictor:
    with (
        spoilt(change),
        patch.object(CpuDevice, "compiler_problem", None),
        patch.object(CpuDevice, "fastest_engine", "compiled"),
    ):
        return load_predictor(stored, device="cpu", **options)


@pytest.mark.parametrize(
    ("change", "value"),
    [(scores_off_by_a_little, "scores"), (deltas_of_the_first_image_for_all, "boxes"), (masks_of_nan, "masks")],
)
def test_what_computes_something_else_is_replaced_under_auto_and_refused_by_name(
    change: Callable[[Parts], Parts], value: str, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = load_by_compiled(store(FAMILY), change)
    assert predictor.info.engine == "compiled"
    predictor.warm_up()
    info = predictor.info
    assert (info.engine, info.precision) == ("eager", "float32")
    assert info.verification is not None
    assert not info.verification.has_passed
    assert info.verification.engine == "compiled"  # what did not pass is told
    failed = [name for name, one in info.verification.values.items() if one.difference > one.tolerance]
    assert failed == [value]
    if value == "masks":
        assert info.verification.values["masks"].difference == NOT_FINITE
    assert "takes the place" in caplog.text
    named = load_by_compiled(store(FAMILY), change, engine="compiled")
    with pytest.raises(ModelStoreError, match=r"engine 'compiled' in float32 differs from eager in float32: boxes"):
        named.warm_up()


def test_engine_that_fails_as_it_warms_up_is_replaced_too(store: Any) -> None:
    def failing(parts: Parts) -> Parts:
        def trunk(batch: Tensor) -> TrunkOutput:
            raise RuntimeError("cannot")

        return Parts(trunk, parts.backbone, parts.box_head, parts.mask_head)

    predictor = load_by_compiled(store(FAMILY), failing)
    predictor.warm_up()
    assert predictor.info.engine == "eager"


def test_compiled_that_compiled_nothing_is_not_called_compiled(store: Any) -> None:
    """As where dynamo gives up: the answers are right, and slow."""
    with patch.object(torch, "compile", lambda function, backend: function):
        predictor = load_by_compiled(store(FAMILY), lambda parts: parts)
        predictor.warm_up()
        assert predictor.info.engine == "eager"
        named = load_by_compiled(store(FAMILY), lambda parts: parts, engine="compiled")
        with pytest.raises(ModelStoreError, match="did not compile the box head and the mask head and the trunk"):
            named.warm_up()


def test_precision_by_name_is_kept_when_the_engine_is_replaced(store: Any) -> None:
    predictor = load_by_compiled(store(FAMILY), masks_of_nan, precision="bfloat16")
    predictor.warm_up()
    assert (predictor.info.engine, predictor.info.precision) == ("eager", "bfloat16")
    assert predictor.info.verification is not None
    assert predictor.info.verification.has_passed
    assert isinstance(predictor._placed.half, HalfNetwork)


def broken(stored: StoredModel, root: Path, **values: str) -> StoredModel:
    """A copy with other lines in its model.toml."""
    folder = root / "broken" / "1"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes((stored.path / "weights.safetensors").read_bytes())
    lines = []
    for line in (stored.path / "model.toml").read_text().splitlines():
        key = line.partition(" ")[0]
        lines.append(f"{key} = {values.pop(key)}" if key in values else line)
    assert not values
    (folder / "model.toml").write_text("\n".join(lines))
    return StoredModel("broken", 1, folder)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("mean", "[nan, 0.4, 0.4]", "finite"),
        ("std", "[inf, 0.4, 0.4]", "finite"),
        ("std", "[1e-300, 0.4, 0.4]", "greater than or equal"),
        ("sizes", "[[inf], [64], [128], [256], [512]]", "finite"),
        ("sizes", "[[1e300], [64], [128], [256], [512]]", "sizes"),
        ("aspect_ratios", "[0.5, nan, 2.0]", "finite"),
    ],
)
def test_configuration_of_which_nothing_finite_comes_is_refused(
    key: str, value: str, problem: str, store: Any, tmp_path: Path
) -> None:
    with pytest.raises(ModelStoreError, match=problem):
        load_predictor(broken(store(FAMILY), tmp_path, **{key: value}), device="cpu", engine="eager").warm_up()


@pytest.mark.parametrize("engine", ["eager", "openvino"])
def test_weights_that_are_no_numbers_are_refused_by_name(engine: str, store: Any, cache_dir: Path) -> None:
    weights = store(FAMILY).load_weights()
    weights["rpn.head.cls_logits.bias"][0] = float("nan")
    with (
        patch.object(StoredModel, "load_weights", lambda self: dict(weights)),
        pytest.raises(ModelStoreError, match=r"expected finite weights, got others in rpn\.head\.cls_logits\.bias"),
    ):
        load_predictor(store(FAMILY), device="cpu", engine=engine, cache_dir=cache_dir)


def test_whatever_goes_wrong_with_a_model_is_told_in_a_line(store: Any) -> None:
    many = RuntimeError("Exception from src/core.cpp:128:\n" + "at operator()\n" * 50)
    with (
        patch("service.inference.loading.build_model", side_effect=many),
        pytest.raises(ModelStoreError, match=r"^fpn-with-masks@1: cannot be loaded: Exception from src/core.cpp:128:$"),
    ):
        load_predictor(store(FAMILY), device="cpu")
    lack = RuntimeError("[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory")
    with (
        patch("service.inference.loading.build_model", side_effect=lack),
        pytest.raises(ModelStoreError, match=r"^fpn-with-masks@1: not enough memory for its network$"),
    ):
        load_predictor(store(FAMILY), device="cpu")


def test_precision_that_the_device_lacks_is_refused(store: Any) -> None:
    with pytest.raises(ServiceError, match="precision 'tf32' is not for cpu"):
        load_predictor(store(FAMILY), device="cpu", precision="tf32")
