from datetime import UTC, datetime
from pathlib import Path

import pytest

from service.errors import ModelStoreError
from service.model_store.model_toml import (
    ProvenanceTable,
    WeightsTable,
    read_model_config,
    read_model_toml,
    write_model_toml,
)
from service.modeling.config import BackboneConfig, ModelConfig, RoIBranchConfig, RoIConfig

CONFIG = ModelConfig(
    architecture="mask_rcnn",
    labels=("cell \N{GREEK SMALL LETTER ALPHA}", 'the "other"'),
    backbone=BackboneConfig(name="narrow_resnet18_fpn", width=32),
    roi=RoIConfig(op="roi_pool", mask=RoIBranchConfig(op="roi_align")),
)
WEIGHTS = WeightsTable(sha256="a" * 64, dtype="float16", source="https://example.org/a.pth")
PROVENANCE = ProvenanceTable(
    data="nuclei",
    created=datetime(2026, 7, 1, 12, tzinfo=UTC),
    metrics={"images": 60, "box": {"AP50": 0.81}},
)
TRAINING_TOML = """
architecture = "faster_rcnn"
labels = ["cell"]

[backbone]
name = "resnet18_fpn"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.toml"


def test_a_written_model_toml_reads_as_what_was_written(path: Path) -> None:
    write_model_toml(path, CONFIG, WEIGHTS, PROVENANCE)
    model_toml = read_model_toml(path)
    assert (model_toml.weights, model_toml.provenance) == (WEIGHTS, PROVENANCE)
    assert read_model_config(path) == CONFIG


def test_defaults_are_written_out_so_that_a_later_release_cannot_change_the_model(path: Path) -> None:
    write_model_toml(path, CONFIG, WEIGHTS, PROVENANCE)
    assert "nms_thresh = 0.7" in path.read_text()


def test_tables_that_a_network_does_not_use_are_not_written(path: Path) -> None:
    write_model_toml(path, CONFIG, WEIGHTS, PROVENANCE)
    assert "[proposals]" not in path.read_text()
    given = CONFIG.model_copy(update={"architecture": "fast_rcnn"})
    write_model_toml(path, given, WEIGHTS, PROVENANCE)
    assert "[rpn]" not in path.read_text()
    assert "[proposals]" in path.read_text()


def test_a_model_toml_serves_as_a_model_config_without_its_own_tables_getting_lost(path: Path) -> None:
    write_model_toml(path, CONFIG, WEIGHTS, PROVENANCE)
    first = read_model_toml(path)
    write_model_toml(path, first, first.weights, first.provenance)
    assert read_model_toml(path) == first


def test_training_needs_no_weights_but_a_stored_model_does(path: Path) -> None:
    path.write_text(TRAINING_TOML)
    assert read_model_config(path).labels == ("cell",)
    with pytest.raises(ModelStoreError, match=r"model\.toml: 1 problem\n  weights: required, but missing"):
        read_model_toml(path)


def test_all_problems_are_named_at_once_with_what_was_expected_and_what_came(path: Path) -> None:
    path.write_text(
        TRAINING_TOML
        + 'nam = "x"\n[roi]\nop = "roi_aling"\n[transform]\nmin_size = 0\n[anchors]\nsizes = [[32], [64, 96]]'
    )
    with pytest.raises(ModelStoreError) as caught:
        read_model_config(path)
    assert str(caught.value).splitlines() == [
        f"{path}: 4 problems",
        "  backbone.nam: unknown key; did you mean 'name'?",
        "  transform.min_size: input should be greater than or equal to 1; got 0",
        "  anchors: expected the same number of sizes times aspect_ratios (at least 1) for every level, got [3, 6]",
        "  roi.op: input should be 'roi_pool', 'roi_align', 'roi_align_max', 'roi_warp', 'spp' or 'crop'; "
        "got 'roi_aling'",
    ]


def test_an_unknown_key_like_no_other_is_answered_with_the_known_ones(path: Path) -> None:
    path.write_text("zzz = 1\n" + TRAINING_TOML)
    with pytest.raises(ModelStoreError, match="zzz: unknown key; known here: architecture, labels, backbone"):
        read_model_config(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'labels = "a\nb"', "not valid TOML: .*line 1"),
        (b"labels = '\xff'", "expected UTF-8 text, got the byte 0xff"),
        (b"labels = " + b"[" * 100_000, "not valid TOML"),
        (b"labels = " + b"9" * 5_000, "not valid TOML"),
        (b".".join([b"a"] * 100_000) + b" = 1", "1000 dots in a line"),
        (b"# " + b"a" * 2_000_000, "at most 1048576 characters"),
    ],
)
def test_what_is_not_toml_is_said_to_be_none(path: Path, content: bytes, problem: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ModelStoreError, match=problem):
        read_model_toml(path)


def test_a_missing_file_and_a_folder_in_its_place_are_named(path: Path) -> None:
    with pytest.raises(ModelStoreError, match=r"model\.toml: no such file"):
        read_model_toml(path)
    path.mkdir()
    with pytest.raises(ModelStoreError, match=r"model\.toml: expected a regular file, got a folder"):
        read_model_toml(path)


def test_the_weights_file_must_lie_beside_its_model_toml(path: Path) -> None:
    path.write_text(TRAINING_TOML + f'[weights]\nfile = "../../other/1/weights.safetensors"\nsha256 = "{"a" * 64}"')
    with pytest.raises(ModelStoreError, match=r"weights\.file: string should match pattern"):
        read_model_toml(path)
