"""An imported detectron2 network answers photographs as detectron2 does, resizing and pasting included. The weights are
those of the bundled model of nuclei, saved as detectron2 would have saved them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco
from safetensors.torch import load_file
from torch import Tensor

from service.inference.loading import load_predictor
from service.inference.predictor import Predictor
from service.masks.rle import encode_rle
from service.model_store.importing import import_checkpoint
from service.model_store.model_toml import ProvenanceTable
from service.model_store.store import ModelStore
from service.modeling.config import TransformConfig
from service.modeling.transform import Transform
from service.structures import DetectOptions, Image, Query
from tests.unit.model_store.detectron2_reference import detectron2_prediction, shortest_edge_size
from tests.unit.model_store.test_detectron2_layout import as_detectron2

ROOT = Path(__file__).parents[3]
MIN_SIZE, MAX_SIZE = 320, 450
SIZES = (10.0, 20.0, 40.0, 80.0, 160.0)
STD_BGR = (57.375, 57.12, 58.395)


@cache
def weights() -> dict[str, Tensor]:
    file = load_file(ROOT / "model_store/nuclei/1/weights.safetensors")
    state_dict = {name: one.float() for name, one in file.items()}
    return as_detectron2(state_dict) | {"pixel_std": torch.tensor(STD_BGR).reshape(3, 1, 1)}


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("detectron2")
    torch.save({"model": weights()}, folder / "model_final.pth")
    given = {
        "transform": {"min_size": MIN_SIZE, "max_size": MAX_SIZE},
        "anchors": {"sizes": [[one] for one in SIZES]},
    }
    imported = import_checkpoint(folder / "model_final.pth", labels=["nucleus"], given=given)
    stored = ModelStore(folder / "store").write_model(
        "nuclei",
        1,
        config=imported.config,
        state_dict=imported.state_dict,
        provenance=ProvenanceTable(),
        readme="",
    )
    return load_predictor(stored, device="cpu", engine="eager")


def photograph(name: str, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """An example, as large as it is or resized to (height, width)."""
    with PIL.Image.open(ROOT / "examples" / name) as file:
        picture = file.convert("RGB")
    if size is not None:
        picture = picture.resize(size[::-1], PIL.Image.Resampling.LANCZOS)
    return np.array(picture)


# Enlarged, shrunk because of the shorter side, shrunk because of the longer one, and left alone.
PICTURES: dict[str, tuple[str, tuple[int, int] | None]] = {
    "256 x 320": ("nuclei-stained.png", None),
    "501 x 403": ("nuclei-2.png", (501, 403)),
    "400 x 755": ("nuclei-stained.png", (400, 755)),
    "320 x 400": ("nuclei-1.png", (320, 400)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_boxes_scores_and_masks_are_detectron2s(name: str, predictor: Predictor) -> None:
    file, size = PICTURES[name]
    picture = photograph(file, size)
    with torch.no_grad():
        expected = detectron2_prediction(
            weights(),
            picture,
            min_size=MIN_SIZE,
            max_size=MAX_SIZE,
            sizes=SIZES,
            std=STD_BGR,
            stride_in_1x1=False,
        )
    found = predictor.predict([Query(Image(picture), DetectOptions())])[0].detections
    assert len(found) > 5
    assert len(found) == len(expected["boxes"])
    # Near-equal scores may change places.
    apart = np.abs(found.boxes[:, None] - expected["boxes"].numpy()).max(axis=2)
    order = apart.argmin(axis=0)
    assert sorted(order) == list(range(len(found)))
    assert apart.min(axis=0).max() < 1e-2
    assert np.abs(found.scores[order] - expected["scores"].numpy()).max() < 1e-3
    assert found.masks is not None
    masks = coco.decode(
        encode_rle(found.masks[order], found.boxes[order], picture.shape[:2], style=predictor.info.mask_style)
    ).transpose(2, 0, 1)
    theirs = (expected["pasted"] >= 0.5).numpy()
    shared, either = (masks & theirs).sum(axis=(1, 2)), (masks | theirs).sum(axis=(1, 2))
    assert (shared >= 0.99 * either).all()


def test_answers_do_not_depend_on_batch_mates(predictor: Predictor) -> None:
    pictures = [Image(photograph(name, (256, 330))) for name in ("nuclei-stained.png", "nuclei-1.png")]
    assert len({predictor.group_key(one.size) for one in pictures}) == 1
    together = predictor.predict([Query(one, DetectOptions()) for one in pictures])
    for picture, one in zip(pictures, together, strict=True):
        alone = predictor.predict([Query(picture, DetectOptions())])[0].detections
        assert np.abs(alone.boxes - one.detections.boxes).max() < 1e-3
        assert np.abs(alone.scores - one.detections.scores).max() < 1e-4


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(200, 900), st.integers(0, 700))
def test_sizes_are_detectron2s(height: int, width: int, min_size: int, more: int) -> None:
    transform = Transform(TransformConfig(style="detectron2", min_size=min_size, max_size=min_size + more))
    expected = shortest_edge_size(height, width, min_size, min_size + more)
    # Where detectron2 arrives at nothing, and fails, we keep a pixel.
    assert transform.resized_size((height, width)) == tuple(max(1, side) for side in expected)
