"""A small COCO-format data set of discs on a dark ground, drawn on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

SIZE = (96, 128)


def write_coco_folder(folder: Path, *, train: int = 8, val: int = 2, seed: int = 0) -> Path:
    """Write `train.json`, `val.json` and `images/`: class `disc`, 2 to 5 objects a picture, masks as RLE."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        document: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "disc"}]}
        for index in range(count):
            _add_picture(document, folder, f"{split}-{index}.png", index + 1, rng)
        (folder / f"{split}.json").write_text(json.dumps(document))
    return folder


def _add_picture(document: dict[str, Any], folder: Path, name: str, image_id: int, rng: np.random.Generator) -> None:
    height, width = SIZE
    pixels = rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
    document["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
    for place in rng.permutation(12)[: rng.integers(2, 6)]:
        centre = (int(place % 4) * 32 + 16, int(place // 4) * 32 + 16)
        mask = np.zeros((height, width), np.uint8)
        cv2.circle(mask, centre, int(rng.integers(8, 14)), 1, -1)
        pixels[mask > 0] = (200, 60, int(rng.integers(100, 255)))
        rle = coco_mask.encode(np.asfortranarray(mask))
        document["annotations"].append(
            {
                "id": len(document["annotations"]) + 1,
                "image_id": image_id,
                "category_id": 7,
                "bbox": coco_mask.toBbox(rle).tolist(),
                "area": float(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
            }
        )
    cv2.imwrite(str(folder / "images" / name), pixels[..., ::-1])
