from __future__ import annotations

from pathlib import Path

import numpy as np

from service.modeling.config import ProposalsConfig
from service.training.dataset import load_coco
from service.training.proposals import ProposalCache
from tests.coco_folder import write_coco_folder

SEARCH = ProposalsConfig(search_width=64)


def test_a_picture_is_searched_once(tmp_path: Path) -> None:
    sample = load_coco(write_coco_folder(tmp_path / "data") / "train.json").samples[0]
    found = ProposalCache(tmp_path / "run", SEARCH).of(sample)
    assert len(found) > 1
    sample.path.unlink()  # what is asked for again comes from the disk
    np.testing.assert_array_equal(ProposalCache(tmp_path / "run", SEARCH).of(sample), found)
    assert [path.name for path in (tmp_path / "run").rglob("*.npy")] == [f"{sample.image_id}.npy"]


def test_another_way_of_searching_has_other_proposals(tmp_path: Path) -> None:
    sample = load_coco(write_coco_folder(tmp_path / "data") / "train.json").samples[0]
    found = ProposalCache(tmp_path / "run", SEARCH).of(sample)
    few = ProposalCache(tmp_path / "run", SEARCH.model_copy(update={"max_count": 1})).of(sample)
    assert len(few) == 1 < len(found)
