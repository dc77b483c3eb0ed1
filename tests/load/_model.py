"""A real detector of a few thousand weights at random, in a model store of its own: what it finds means nothing, but it
takes milliseconds, so that a trial sends thousands of requests through all of the service in minutes.
"""

from __future__ import annotations

from pathlib import Path

import torch

from service.model_store.model_toml import ProvenanceTable
from service.model_store.store import ModelStore
from service.modeling.build import build_model
from service.modeling.config import ModelConfig

NAME = "tiny"


def write_tiny_model(store: Path, *, version: int = 1, min_size: int = 64, seed: int = 0) -> None:
    """Write `tiny@version`.

    Args:
        min_size: what pictures are resized to; the larger, the slower.
        seed: of the weights: other ones give other answers.
    """
    config = ModelConfig.model_validate(
        {
            "architecture": "mask_rcnn",
            "labels": ["thing"],
            "backbone": {"name": "narrow_resnet18_fpn", "width": 2, "out_channels": 4, "norm": "batch_norm"},
            "transform": {"min_size": min_size, "max_size": 2 * min_size},
            "rpn": {"pre_nms_top_n_test": 20, "post_nms_top_n_test": 10},
            "roi": {"box_output_size": 3, "box_head_channels": 8, "mask_output_size": 4, "mask_head_channels": [4]},
            "detections": {"score_thresh": 0.0, "detections_per_img": 3},
        }
    )
    torch.manual_seed(seed)
    state_dict = build_model(config).state_dict()
    ModelStore(store).write_model(
        NAME, version, config=config, state_dict=state_dict, provenance=ProvenanceTable(), readme=""
    )
