"""`ModelConfig`: everything needed to rebuild a network, as stored in `model.toml`; a file for each kind of table.
Defaults are torchvision's for `fasterrcnn_resnet50_fpn`, except where `paper_defaults.py` follows the network's papers.
"""

from service.modeling.config.backbone import BackboneConfig, BackboneName, Norm
from service.modeling.config.model import Architecture, ModelConfig
from service.modeling.config.proposals import AnchorsConfig, ProposalsConfig
from service.modeling.config.roi import PatchOp, RoIBranchConfig, RoIConfig, RoIOp
from service.modeling.config.transform import NUM_CHANNELS, TransformConfig

__all__ = [
    "NUM_CHANNELS",
    "AnchorsConfig",
    "Architecture",
    "BackboneConfig",
    "BackboneName",
    "ModelConfig",
    "Norm",
    "PatchOp",
    "ProposalsConfig",
    "RoIBranchConfig",
    "RoIConfig",
    "RoIOp",
    "TransformConfig",
]
