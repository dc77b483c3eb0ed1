"""`roiserve quantize`, from a tiny model to a version in int8, and how that version is served and refused."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner, Result

from service.cli import app
from service.errors import ModelStoreError, ServiceError
from service.inference.loading import load_predictor
from service.inference.predictor import Predictor
from service.model_store.quantizers import Int8Layer, Part, PartQuantizers
from service.model_store.store import ModelStore, StoredModel
from service.modeling.parts import TrunkOutput
from service.structures import DetectOptions, Image, Query
from service.training.quantization import run as quantization_run
from service.training.quantization import search as quantization_search
from service.training.quantization.calibration import record
from service.training.quantization.proposing import Proposal, check_installed
from service.training.quantization.search import Ap, NothingLeftError, Plan, search
from service.training.quantization.state import State
from service.training.run_folder import locked
from tests.coco_folder import write_coco_folder
from tests.tiny_models import store_untrained
from tests.unit.training.test_comparing import CONFIG

pytest.importorskip("nncf")
pytest.importorskip("openvino")


def quantize(folder: Path, *arguments: str) -> Result:
    command = ["quantize", "--model", "discs", "--data", str(folder / "data" / "train.json")]
    command += ["--store", str(folder / "store"), "--max-ap-loss", "100", *arguments]
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, command)


def prepared(folder: Path) -> Path:
    write_coco_folder(folder / "data", train=4)
    store_untrained(folder / "store", "discs", CONFIG)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose store has the tiny model in float32, and its version 2 in int8."""
    folder = prepared(tmp_path_factory.mktemp("quantized"))
    result = quantize(folder)
    assert result.exit_code == 0, (result.output, result.exception)
    return folder


@pytest.fixture
def stored(made: Path, tmp_path: Path) -> StoredModel:
    """The version in int8, in a store of the test's own."""
    shutil.copytree(made / "store", tmp_path / "store")
    return ModelStore(tmp_path / "store").find("discs@2")


def loaded(stored: StoredModel, cache_dir: Path, *, precision: str = "auto", engine: str = "auto") -> Predictor:
    with patch("service.inference.engines.openvino.has_int8", return_value=True):
        predictor = load_predictor(stored, device="cpu", precision=precision, engine=engine, cache_dir=cache_dir)
    predictor.warm_up()
    return predictor


def pictures(count: int) -> Sequence[Query]:
    numbers = np.random.default_rng(0)
    options = DetectOptions(score_thresh=0.0, max_detections=10)
    return [Query(Image(numbers.integers(0, 256, (96, 128, 3), dtype=np.uint8)), options) for _ in range(count)]


def test_nncf_says_errors_only_and_the_handlers_that_others_attached_to_its_logger_keep_their_level() -> None:
    logger, handler = logging.getLogger("nncf"), logging.NullHandler()
    logger.addHandler(handler)
    check_installed()
    logger.removeHandler(handler)
    assert handler.level == logging.NOTSET
    assert logger.getEffectiveLevel() == logging.ERROR


def test_the_version_says_what_it_is(stored: StoredModel) -> None:
    table = stored.model_toml.int8
    assert table is not None
    assert table.parts == ("trunk", "box_head", "mask_head")
    assert (table.pictures, table.kept_float) == (4, ())
    assert {"float32", "int8"} <= table.ap.keys()
    card = (stored.path / "README.md").read_text()
    assert "discs@1 with trunk, box head and mask head in int8" in card
    assert "roiserve" in card
    assert f"boxes {table.tolerances.boxes:g} px" in card
    assert stored.problem is None
    assert not (stored.path.parent / ".quantizing-2").exists()


def test_its_weights_are_a_byte_each_and_come_back_within_half_a_step(stored: StoredModel) -> None:
    original = ModelStore(stored.path.parent.parent).find("discs@1").load_weights()
    weights = stored.load_weights()
    assert weights.keys() == original.keys()
    key = "backbone.body.layer1.0.conv1.weight"
    steps = original[key].flatten(start_dim=1).abs().amax(dim=1) / 127
    assert ((weights[key] - original[key]).abs().flatten(start_dim=1).amax(dim=1) <= steps * 0.501).all()
    assert safetensors.torch.load_file(stored.weights_path)[key].dtype == torch.int8


def test_it_is_served_in_int8_and_passes_its_verification(stored: StoredModel, tmp_path: Path) -> None:
    info = loaded(stored, tmp_path).info
    assert (info.engine, info.precision) == ("openvino", "int8")
    assert info.verification is not None
    assert info.verification.has_passed


def test_an_image_gets_the_same_answer_bit_by_bit_alone_and_in_a_batch(stored: StoredModel, tmp_path: Path) -> None:
    predictor = loaded(stored, tmp_path)
    together = predictor.predict(pictures(8))
    for query, of_batch in zip(pictures(8), together, strict=True):
        [alone] = predictor.predict([query])
        np.testing.assert_array_equal(alone.detections.labels, of_batch.detections.labels)
        np.testing.assert_array_equal(alone.detections.boxes, of_batch.detections.boxes)
        np.testing.assert_array_equal(alone.detections.scores, of_batch.detections.scores)
        assert alone.detections.masks is not None
        assert of_batch.detections.masks is not None
        np.testing.assert_array_equal(alone.detections.masks, of_batch.detections.masks)


def test_a_graph_for_one_size_rounds_as_the_one_for_any_size(stored: StoredModel, tmp_path: Path) -> None:
    parts = loaded(stored, tmp_path)._model.parts
    assert parts is not None
    trunk = parts.trunk.__self__._trunk  # type: ignore[attr-defined]
    batch = torch.rand(8, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = [one.clone() for one in trunk(batch)]
        trunk._thread.join()
        assert list(trunk._graphs) == [(96, 128)]
        for ours, expected in zip(trunk(batch), before, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_features_are_the_same_where_a_batch_needs_no_rpn(stored: StoredModel, tmp_path: Path) -> None:
    parts = loaded(stored, tmp_path)._model.parts
    assert parts is not None
    batch = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        with_rpn = {name: one.clone() for name, one in parts.trunk(batch).features.items()}
        alone = parts.backbone(batch)
    for name, features in with_rpn.items():
        torch.testing.assert_close(alone[name], features, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("precision", "engine"), [("float32", "auto"), ("auto", "eager"), ("float32", "openvino")])
def test_it_is_served_in_float32_too(stored: StoredModel, tmp_path: Path, precision: str, engine: str) -> None:
    assert loaded(stored, tmp_path, precision=precision, engine=engine).info.precision == "float32"


def test_without_vnni_auto_is_float32_with_a_line_in_the_log(
    stored: StoredModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO),
        patch("service.inference.engines.openvino.has_int8", return_value=False),
    ):
        predictor = load_predictor(stored, device="cpu", cache_dir=tmp_path)
    assert predictor.info.precision == "float32"
    assert "a quantised model does not run in int8" in caplog.text


@pytest.mark.parametrize(
    ("version", "engine", "message"), [(1, "auto", "not quantised"), (2, "eager", "int8 runs on the engine 'openvino'")]
)
def test_int8_by_name_is_int8_or_an_error(
    stored: StoredModel, tmp_path: Path, version: int, engine: str, message: str
) -> None:
    model = ModelStore(stored.path.parent.parent).find(f"discs@{version}")
    with pytest.raises(ServiceError, match=message):
        load_predictor(model, device="cpu", precision="int8", engine=engine, cache_dir=tmp_path)


def test_int8_is_never_what_auto_takes_for_another_version(stored: StoredModel, tmp_path: Path) -> None:
    model = ModelStore(stored.path.parent.parent).find("discs@1")
    assert loaded(model, tmp_path).info.precision == "float32"


def test_quantisers_that_were_changed_are_refused(stored: StoredModel, tmp_path: Path) -> None:
    file = stored.path / "int8.json"
    file.write_text(file.read_text().replace('"low":', '"low": '))
    with pytest.raises(ModelStoreError, match=r"int8\.json: the file was changed"):
        loaded(stored, tmp_path)
    assert stored.problem is not None


def replace_quantizers(stored: StoredModel, text: str) -> StoredModel:
    (stored.path / "int8.json").write_text(text)
    table = stored.model_toml.int8
    assert table is not None
    toml = stored.path / "model.toml"
    toml.write_text(toml.read_text().replace(table.sha256, hashlib.sha256(text.encode()).hexdigest()))
    return ModelStore(stored.path.parent.parent).find(stored.key)


@pytest.mark.parametrize("text", ["", "{", '{"trunk": {"layers": 3}}', '{"neck": {}}', "\N{BYTE ORDER MARK}{}"])
def test_what_is_not_a_file_of_quantisers_is_refused(stored: StoredModel, tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelStoreError, match=r"int8\.json"):
        loaded(replace_quantizers(stored, text), tmp_path)


def test_quantisers_of_other_parts_than_the_model_says_are_refused(stored: StoredModel, tmp_path: Path) -> None:
    document = json.loads((stored.path / "int8.json").read_text())
    document["box_head"] = {}
    with pytest.raises(ModelStoreError, match=r"expected layers of .*box_head.*, got layers of trunk"):
        loaded(replace_quantizers(stored, json.dumps(document)), tmp_path)


def test_quantisers_of_another_graph_are_refused_by_name_and_passed_over_by_auto(
    stored: StoredModel, tmp_path: Path
) -> None:
    foreign = replace_quantizers(stored, (stored.path / "int8.json").read_text().replace("layer1.0", "stage1.0"))
    with pytest.raises(ModelStoreError, match="made for a graph with"):
        loaded(foreign, tmp_path, precision="int8")
    assert loaded(foreign, tmp_path).info.precision == "float32"


def test_ranges_for_another_number_of_channels_are_refused(stored: StoredModel, tmp_path: Path) -> None:
    document = json.loads((stored.path / "int8.json").read_text())
    document["trunk"]["activations"][0] |= {"low": [0.0, 0.0], "high": [1.0, 2.0]}
    with pytest.raises(ModelStoreError, match="channels, not 2"):
        loaded(replace_quantizers(stored, json.dumps(document)), tmp_path, precision="int8")


def test_ranges_that_ruin_the_answers_do_not_pass_the_verification(stored: StoredModel, tmp_path: Path) -> None:
    document = json.loads((stored.path / "int8.json").read_text())
    for one in document["trunk"]["activations"]:
        one["high"] = one["low"] + (one["high"] - one["low"]) / 1000
    ruined = replace_quantizers(stored, json.dumps(document))
    with pytest.raises(ModelStoreError, match="differs from eager in float32"):
        loaded(ruined, tmp_path, precision="int8")
    info = loaded(ruined, tmp_path).info
    assert info.precision == "float32"


def test_a_few_wrong_values_do_not_pass_the_verification(stored: StoredModel, tmp_path: Path) -> None:
    """The best hundred anchors, less than a hundredth of all, are those that become proposals."""
    with patch("service.inference.engines.openvino.has_int8", return_value=True):
        predictor = load_predictor(stored, device="cpu", precision="int8", cache_dir=tmp_path)
    parts = predictor._model.parts
    assert parts is not None

    def trunk(batch: torch.Tensor) -> TrunkOutput:
        output = parts.trunk(batch)
        best = output.objectness.topk(100, dim=1).indices
        return replace(output, objectness=output.objectness.scatter(1, best, -10.0))

    predictor._model.parts = replace(parts, trunk=trunk)
    with pytest.raises(ModelStoreError, match="differs from eager in float32"):
        predictor.warm_up()


def test_weights_without_their_scale_are_refused(stored: StoredModel, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(stored.weights_path)
    del tensors["backbone.body.conv1.weight.int8_scale"]
    data = safetensors.torch.save(tensors)
    stored.weights_path.write_bytes(data)
    toml = stored.path / "model.toml"
    toml.write_text(toml.read_text().replace(stored.model_toml.weights.sha256, hashlib.sha256(data).hexdigest()))
    with pytest.raises(ModelStoreError, match=r"a scale for each weight in int8.*backbone\.body\.conv1"):
        loaded(ModelStore(stored.path.parent.parent).find("discs@2"), tmp_path)


def test_a_version_in_int8_is_not_quantised_again(made: Path) -> None:
    result = quantize(made, "--model", "discs@2")
    assert isinstance(result.exception, ServiceError)
    assert "in int8 already" in str(result.exception)


def test_a_model_that_cannot_be_quantised_is_refused_before_the_pictures_are_read(made: Path) -> None:
    result = quantize(made, "--model", "discs@2", "--data", str(made / "missing.json"))
    assert isinstance(result.exception, ServiceError)
    assert "in int8 already" in str(result.exception)


def test_a_folder_that_cannot_be_written_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    state = State(tmp_path / "run", "a model")
    state.remove()  # as good as a full disk: nothing can be written there any more
    with pytest.raises(ModelStoreError, match=r"state\.json: cannot be written"):
        state.put("recorded", True)
    model: Any = SimpleNamespace(parts=SimpleNamespace(trunk=None, backbone=None, mask_head=None))
    unused: Any = None
    with pytest.raises(ModelStoreError, match=r"recorded\.safetensors: cannot be written"):
        record(unused, model, [], state.folder / "recorded.safetensors", advance=lambda: None)


def test_what_a_run_with_other_data_left_is_removed_but_not_the_folder_which_is_locked(tmp_path: Path) -> None:
    State(tmp_path / "run", "a model").put("recorded", True)
    (tmp_path / "run/compiled").mkdir()
    with locked(tmp_path / "run"):
        assert not State(tmp_path / "run", "another").was_begun
        assert list((tmp_path / "run").iterdir()) == []
        with pytest.raises(ModelStoreError, match="another run"), locked(tmp_path / "run"):
            pass


def test_an_interrupted_run_goes_on_where_it_stopped_and_gives_the_same_files(made: Path, tmp_path: Path) -> None:
    prepared(tmp_path)
    with patch.object(quantization_run, "search", side_effect=KeyboardInterrupt):
        stopped = quantize(tmp_path)
    assert (stopped.exit_code, "the same command resumes" in stopped.output) == (130, True)
    with locked(tmp_path / "store/discs/.quantizing-2"):
        assert "another run is using it" in str(quantize(tmp_path).exception)
    again = AssertionError("done again")
    with (
        patch.object(quantization_run, "record", side_effect=again),
        patch.object(quantization_run, "propose", side_effect=again),
    ):
        result = quantize(tmp_path)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "resuming an earlier run" in result.output
    for file in ("int8.json", "weights.safetensors"):
        ours, theirs = ((one / "store/discs/2" / file).read_bytes() for one in (made, tmp_path))
        assert hashlib.sha256(ours).digest() == hashlib.sha256(theirs).digest()


def proposal(*layers: str) -> Proposal:
    return Proposal(
        quantizers=PartQuantizers(layers=tuple(Int8Layer(operation=one) for one in layers)),
        names={one: one for one in layers},
    )


PROPOSALS: Mapping[Part, Proposal] = {
    "trunk": proposal("a", "b", "c"),
    "box_head": proposal("d"),
    "mask_head": proposal("e", "f"),
}
BEFORE = {"boxes": 0.6, "masks": 0.5}


@dataclass
class Costs:
    """Each layer in int8 costs so many points of AP of the masks."""

    points: Mapping[str, float]
    asked: list[Plan] = field(default_factory=list)

    def ap(self, plan: Plan) -> Ap:
        self.asked.append(dict(plan))
        lost = sum(self.points.get(layer, 0.0) for layers in plan.values() for layer in layers)
        return {"boxes": 0.6, "masks": 0.5 - lost / 100}

    def by_error(self, part: Part) -> Sequence[str]:
        return sorted(PROPOSALS[part].layers, key=lambda layer: -self.points.get(layer, 0.0))


def test_everything_stays_in_int8_where_the_loss_is_within_the_bound() -> None:
    costs = Costs({"a": 0.1, "f": 0.1})
    assert search(PROPOSALS, BEFORE, costs, max_ap_loss=0.3).plan == {
        "trunk": {"a", "b", "c"},
        "box_head": {"d"},
        "mask_head": {"e", "f"},
    }
    assert len(costs.asked) == 1


def test_the_layer_of_the_part_that_loses_most_goes_back_first() -> None:
    found = search(PROPOSALS, BEFORE, Costs({"a": 0.2, "f": 1.0}), max_ap_loss=0.3)
    assert found.plan == {"trunk": {"a", "b", "c"}, "box_head": {"d"}, "mask_head": {"e"}}
    assert found.ap["masks"] == pytest.approx(0.498)


def test_a_part_that_loses_in_every_layer_goes_back_whole() -> None:
    found = search(PROPOSALS, BEFORE, Costs({"e": 1.0, "f": 1.0, "b": 0.4}), max_ap_loss=0.3)
    assert found.plan == {"trunk": {"a", "c"}, "box_head": {"d"}, "mask_head": frozenset()}


def test_if_nothing_can_stay_that_is_said() -> None:
    with pytest.raises(NothingLeftError, match="no version was written"):
        search(PROPOSALS, BEFORE, Costs(dict.fromkeys("abcdef", 1.0)), max_ap_loss=0.3)


def test_a_part_that_goes_back_is_stored_and_runs_in_float32(tmp_path: Path) -> None:
    """All is real but the loss: of all parts, then of each, then after each layer that the mask head gives back."""
    prepared(tmp_path)
    with patch.object(quantization_search, "loss", side_effect=[1.0, 0.0, 0.0, 1.0, 1.0, 0.0]):
        result = quantize(tmp_path, "--max-ap-loss", "0.3")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "back to float32 in the mask head: " in result.output
    stored = ModelStore(tmp_path / "store").find("discs@2")
    table, quantizers = stored.model_toml.int8, stored.load_quantizers()
    assert table is not None
    assert table.parts == ("trunk", "box_head")
    assert quantizers is not None
    assert quantizers.mask_head == PartQuantizers()
    key = "roi_heads.mask_head.0.0.weight"
    original = ModelStore(tmp_path / "store").find("discs@1").load_weights()
    assert torch.equal(stored.load_weights()[key], original[key])
    assert loaded(stored, tmp_path / "cache").info.precision == "int8"
