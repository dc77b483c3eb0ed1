"""Small networks that are given their proposals, for discs as `coco_folder.py` draws them, and a store to hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from service.model_store.model_toml import ProvenanceTable
from service.model_store.store import ModelStore, StoredModel
from service.modeling.build import build_model
from service.modeling.config import ModelConfig

LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
"""All that a network may have, by torchvision's names."""
_TABLES: dict[str, dict[str, Any]] = {
    "fast_rcnn": {
        "backbone": {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16, "norm": "batch_norm"},
        "roi": {"box_head_channels": 32, "batch_size_per_image": 16},
    },
    "rcnn": {
        "backbone": {"name": "narrow_resnet18_c5", "width": 8, "norm": "batch_norm"},
        "roi": {"box_head_channels": 32, "batch_size_per_image": 8, "box_output_size": 2, "crop_size": 64},
    },
}


def given_proposals(architecture: str) -> ModelConfig:
    """The smallest `fast_rcnn` or `rcnn` whose callers give the proposals."""
    return ModelConfig.model_validate(
        {
            "architecture": architecture,
            "labels": ["disc"],
            "transform": {"min_size": 96, "max_size": 128},
            "proposals": {"source": "caller", "search_width": 64, "max_count": 50},
            "detections": {"score_thresh": 0.0, "detections_per_img": 5},
            **_TABLES[architecture],
        }
    )


def store_untrained(root: Path, name: str, config: ModelConfig) -> StoredModel:
    """Put a network with random weights into a store."""
    torch.manual_seed(0)
    return ModelStore(root).write_model(
        name, 1, config=config, state_dict=build_model(config).state_dict(), provenance=ProvenanceTable(), readme=""
    )
