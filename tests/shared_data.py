"""Where the real data sets are: beside the repository, not in it. Tests that need them skip with a reason without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def require(name: str) -> Path:
    """The folder of a data set in COCO format."""
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"the data set {name} is not at {folder}")
    return folder


def write_slice(source: Path, target: Path, *, train: int, val: int, size: tuple[int, int]) -> Path:
    """The first pictures of one size of each split, as a data set of their own; the pictures are links."""
    target.mkdir(parents=True)
    (target / "images").symlink_to(source / "images")
    for split, count in (("train", train), ("val", val)):
        document = json.loads((source / f"{split}.json").read_text())
        images = [one for one in document["images"] if (one["height"], one["width"]) == size][:count]
        ids = {one["id"] for one in images}
        annotations = [one for one in document["annotations"] if one["image_id"] in ids]
        (target / f"{split}.json").write_text(json.dumps(document | {"images": images, "annotations": annotations}))
    return target
