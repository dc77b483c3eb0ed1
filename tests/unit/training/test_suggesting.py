"""What is suggested follows from the objects' sizes, which are known here."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from service.errors import DatasetError
from service.modeling.config import ModelConfig
from service.training.dataset import CocoDataset, load_coco
from service.training.suggesting import suggest, suggestion_text


def squares(folder: Path, sides: list[float], *, ratio: float = 1.0) -> CocoDataset:
    """One picture of 300 x 200 with objects of these widths."""
    document: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png", "height": 200, "width": 300}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "bbox": [0, 0, side, side * ratio]}
            for n, side in enumerate(sides, start=1)
        ],
    }
    Image.new("RGB", (300, 200)).save(folder / "a.png")
    (folder / "train.json").write_text(json.dumps(document))
    return load_coco(folder / "train.json")


def test_small_objects_are_enlarged_and_anchors_lie_around_their_sides(tmp_path: Path) -> None:
    suggestion = suggest(squares(tmp_path, [16.0] * 20))
    config = ModelConfig.model_validate(suggestion.document)
    # 16 pixels are to become 32, so the short side of 200 becomes 400, on the grid of 32: 384 or 416.
    assert config.transform.min_size in (384, 416)
    assert suggestion.scale == pytest.approx(config.transform.min_size / 200)
    sides = [side for [side] in config.anchors.sizes]
    assert sides == sorted(sides)
    assert sides[2] == pytest.approx(16 * suggestion.scale, abs=1)
    assert sides[2] / sides[1] == pytest.approx(1.25, abs=0.05)
    assert config.anchors.aspect_ratios == (1.0,)
    assert suggestion.matched == 1.0


def test_anchors_span_objects_of_all_sizes(tmp_path: Path) -> None:
    config = ModelConfig.model_validate(suggest(squares(tmp_path, [20, 40, 60, 100, 180] * 5)).document)
    scale = config.transform.min_size / 200
    assert [side for [side] in config.anchors.sizes] == pytest.approx(
        [s * scale for s in (20, 40, 60, 100, 180)], abs=1
    )


def test_long_objects_have_anchors_of_their_shape_both_ways(tmp_path: Path) -> None:
    suggestion = suggest(squares(tmp_path, [40.0] * 10, ratio=4.0))
    assert ModelConfig.model_validate(suggestion.document).anchors.aspect_ratios == (0.25, 1.0, 4.0)
    assert suggestion.matched == 1.0


def test_limits_lie_above_the_fullest_picture(tmp_path: Path) -> None:
    config = ModelConfig.model_validate(suggest(squares(tmp_path, [10.0] * 301)).document)
    assert config.detections.detections_per_img == 460
    assert config.rpn.post_nms_top_n_test >= 2 * 301


def test_what_is_written_is_a_configuration_with_its_reasons(tmp_path: Path) -> None:
    text = suggestion_text(suggest(squares(tmp_path, [16.0, 30.0])), source="cells")
    assert text.startswith("# Fitted to cells by `roiserve train --suggest`:\n# the median side of objects is ")
    assert ModelConfig.model_validate(tomllib.loads(text)).labels == ("cell",)


def test_without_objects_nothing_can_be_fitted(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected objects to fit a network to"):
        suggest(squares(tmp_path, []))
