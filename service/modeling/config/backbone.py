"""`[backbone]`: the trunk and its feature pyramid."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from service.modeling.config.table import Channels, Table, one_of

BackboneName = Literal[
    "resnet18_fpn",
    "resnet34_fpn",
    "resnet50_fpn",
    "resnet101_fpn",
    "resnet152_fpn",
    "resnext50_32x4d_fpn",
    "resnext101_32x4d_fpn",
    "resnext101_32x8d_fpn",
    "resnext101_64x4d_fpn",
    "wide_resnet50_2_fpn",
    "wide_resnet101_2_fpn",
    "narrow_resnet18_fpn",
    "mobilenet_v3_large_fpn",
    "resnet50_c4",
    "resnet101_c4",
    "resnet152_c4",
    "resnet18_c5",
    "resnet34_c5",
    "resnet50_c5",
    "resnet101_c5",
    "resnet152_c5",
    "resnext50_32x4d_c5",
    "resnext101_32x8d_c5",
    "narrow_resnet18_c5",
    "vgg16",
]
Norm = Literal["batch_norm", "frozen_batch_norm", "group_norm"]
ExtraBlocks = Literal["pool", "p6p7", "p6p7_on_c5", "none"]
Stage = Annotated[int, Field(ge=1, le=4)]


class BackboneConfig(Table):
    """The trunk that computes the feature maps.

    Attributes:
        name: torchvision's trunk with its feature pyramid (`narrow_resnet18_fpn`: ResNet-18 with `width` channels in
            its first stage instead of 64); or one map of stride 16: `resnet*_c4`'s conv4, with res5 after the RoI
            pooler as the box head, or `vgg16`'s conv5_3; or one map of stride 32: `*_c5`'s conv5; or
            `torchvision/<model>`: the one map of that model's `.features`; or `timm/<model>`: a pyramid over the
            feature maps of any timm model that has some.
        out_channels: channels of every feature map of the pyramid. Not used without a pyramid.
        width: channels of the first stage, for the narrow trunks only.
        norm: `batch_norm` updates its running statistics: use it from scratch, with large batches.
            `frozen_batch_norm` keeps the loaded ones: use it to fine-tune with small batches. `group_norm` has 32
            groups and no statistics. `vgg16` has no norms.
        norm_eps: added to the variance in the trunk's norms; 0 in torchvision's published `*_resnet50_fpn` detectors.
        fpn_norm: norm after the pyramid's convolutions, which then have no bias; no norm by default.
        stride_in_1x1: whether a stage's strided bottleneck strides in its first 1 x 1 convolution, like detectron2's
            MSRA weights, and not in its 3 x 3 convolution, like torchvision's.
        returned_layers: stages of a ResNet that the pyramid is built over, 1 to 4, without gaps.
        features_stop: `torchvision/<model>` only: the trunk is `.features[:features_stop]`, as in Python; all of
            `.features` by default.
        extra_blocks: coarser maps on top of the pyramid: `pool`, one subsampled from the last map; `p6p7`, two strided
            convolutions after the last map; `p6p7_on_c5`, the same after the trunk's last stage; or `none`.
    """

    name: str
    out_channels: Channels = 256
    width: Channels | None = None
    norm: Norm = "frozen_batch_norm"
    norm_eps: Annotated[float, Field(ge=0, le=1)] = 1e-5
    fpn_norm: Norm | None = None
    stride_in_1x1: bool = False
    returned_layers: tuple[Stage, ...] = (1, 2, 3, 4)
    extra_blocks: ExtraBlocks = "pool"
    features_stop: Annotated[int, Field(ge=-100, le=100)] | None = None

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        known = get_args(BackboneName)
        if name not in known and not re.fullmatch(r"(timm|torchvision)/[A-Za-z0-9_.]+", name):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"expected {one_of(BackboneName)}, or torchvision/<model>, or timm/<model>, got {name!r}{hint}"
            )
        return name

    @model_validator(mode="after")
    def _stride_belongs_to_bottlenecks(self) -> Self:
        if self.stride_in_1x1 and not self.has_bottlenecks:
            raise ValueError(f"'stride_in_1x1' is for ResNets of 50 and more layers, got name={self.name!r}")
        return self

    @model_validator(mode="after")
    def _pyramid_norm_belongs_to_a_pyramid(self) -> Self:
        if self.fpn_norm and not self.has_pyramid:
            raise ValueError(f"'fpn_norm' is for the backbones named *_fpn and timm/*, got name={self.name!r}")
        return self

    @model_validator(mode="after")
    def _width_belongs_to_the_narrow_trunk(self) -> Self:
        if (self.width is not None) != self.name.startswith("narrow_"):
            raise ValueError(
                f"'width' is for narrow_resnet18_*, which need it; got name={self.name!r}, width={self.width}"
            )
        return self

    @model_validator(mode="after")
    def _pyramid_has_its_stages(self) -> Self:
        layers, is_resnet_fpn = self.returned_layers, self.has_pyramid and "resne" in self.name and "/" not in self.name
        if (layers != (1, 2, 3, 4) or self.extra_blocks != "pool") and not is_resnet_fpn:
            raise ValueError(
                f"'returned_layers' and 'extra_blocks' are for ResNets with a pyramid, got name={self.name!r}"
            )
        if not layers or layers != tuple(range(layers[0], layers[0] + len(layers))):
            raise ValueError(f"expected returned_layers without gaps, such as [2, 3, 4], got {list(layers)}")
        if self.extra_blocks.startswith("p6p7") and layers[-1] != 4:
            raise ValueError(f"expected returned_layers up to 4 below {self.extra_blocks}, got {list(layers)}")
        return self

    @model_validator(mode="after")
    def _stop_belongs_to_features(self) -> Self:
        if self.features_stop is not None and self.torchvision_model is None:
            raise ValueError(f"'features_stop' is for torchvision/<model>, got name={self.name!r}")
        return self

    @model_validator(mode="after")
    def _groups_fit_the_channels(self) -> Self:
        channels = {"width": self.width, "out_channels": self.out_channels if self.fpn_norm == "group_norm" else None}
        for key, count in channels.items():
            if count is not None and count % 32 and "group_norm" in (self.norm, self.fpn_norm):
                raise ValueError(f"expected {key} to be a multiple of 32 with group_norm, got {count}")
        if self.norm == "group_norm" and ("resne" not in self.name or "/" in self.name):
            raise ValueError(f"norm = 'group_norm' is for ResNets, got name={self.name!r}")
        return self

    @property
    def timm_model(self) -> str | None:
        """The trunk's name in timm, if it is one of timm's."""
        return self.name.removeprefix("timm/") if self.name.startswith("timm/") else None

    @property
    def torchvision_model(self) -> str | None:
        """The classifier in torchvision whose `.features` are the trunk, if it is one."""
        return self.name.removeprefix("torchvision/") if self.name.startswith("torchvision/") else None

    @property
    def has_bottlenecks(self) -> bool:
        """Whether it is a ResNet with bottlenecks, that is, 50 layers or more."""
        return re.match(r"(wide_)?resne[x]?t(50|101|152)_", self.name) is not None

    @property
    def has_pyramid(self) -> bool:
        """Whether there are several feature maps."""
        return self.name.endswith("_fpn") or self.timm_model is not None

    @property
    def num_levels(self) -> int | None:
        """Number of feature maps that the RPN sees, including a pyramid's extra ones; None if only timm knows."""
        if self.timm_model is not None:
            return None
        if not self.has_pyramid:
            return 1
        if self.name == "mobilenet_v3_large_fpn":
            return 3
        return len(self.returned_layers) + {"pool": 1, "none": 0}.get(self.extra_blocks, 2)

    @property
    def has_res5_head(self) -> bool:
        """Whether the trunk's last stage, res5, is the box head."""
        return self.name.endswith("_c4")
