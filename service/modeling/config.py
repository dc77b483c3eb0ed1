"""`ModelConfig`: everything needed to rebuild a network, as stored in `model.toml`. Defaults are torchvision's for
`fasterrcnn_resnet50_fpn`, except where `_paper_defaults` follows the network's papers.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

Architecture = Literal["faster_rcnn", "mask_rcnn", "fast_rcnn", "rcnn"]
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
ColourChannels = Literal["rgb", "grey", "rgba"]
NUM_CHANNELS: Mapping[ColourChannels, int] = {"rgb": 3, "grey": 1, "rgba": 4}
"""The number of channels that the network reads."""
PatchOp = Literal["roi_pool", "roi_align", "roi_align_max", "roi_warp"]
RoIOp = Literal[PatchOp, "spp", "crop"]
Style = Literal["torchvision", "detectron2"]
Probability = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(ge=1, le=8192)]
Channels = Annotated[int, Field(ge=1, le=4096)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Side = Annotated[int, Field(ge=1, le=64)]
Scale = Annotated[float, Field(gt=0, le=1000)]
Stage = Annotated[int, Field(ge=1, le=4)]
# Anchors are computed at every location of every map, so a long list costs memory and time for every picture.
AnchorSide = Annotated[float, Field(gt=0, le=65_536)]
Ratio = Annotated[float, Field(gt=0, le=1000)]
Ratios = Annotated[tuple[Ratio, ...], Field(min_length=1, max_length=32)]


class _Table(BaseModel):
    """A table of `model.toml`: unknown keys are errors, numbers must be finite, and instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BackboneConfig(_Table):
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
                f"expected {_one_of(BackboneName)}, or torchvision/<model>, or timm/<model>, got {name!r}{hint}"
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


class TransformConfig(_Table):
    """How pixels become the network's input: scaled to 0..1, normalised, and resized so that the shorter side is
    `min_size` pixels unless the longer one would then exceed `max_size`.

    Attributes:
        style: `torchvision` normalises, then interpolates between the four nearest pixels, and rounds the new size
            down; `detectron2` resizes bytes as Pillow does, averaging over all pixels that a new one covers, to the
            nearest size, then normalises.
        size_divisible: a batch is padded to a multiple of this; detectron2 does not pad for C4, which is 1.
        channels: input of the first convolution: `rgb`; `grey`, the luminance 0.299 R + 0.587 G + 0.114 B rounded to a
            byte like Pillow; or `rgba`, whose alpha is always 1, because pictures are decoded onto a background.
        mean: of each channel; subtracted.
        std: of each channel; the difference is divided by it.
    """

    style: Style = "torchvision"
    min_size: Pixels = 800
    max_size: Pixels = 1333
    size_divisible: Annotated[int, Field(ge=1, le=256)] = 32
    channels: ColourChannels = "rgb"
    mean: tuple[Annotated[float, Field(ge=-1000, le=1000)], ...] = (0.485, 0.456, 0.406)
    std: tuple[Annotated[float, Field(ge=1e-6, le=1000)], ...] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _min_is_not_above_max(self) -> Self:
        if self.min_size > self.max_size:
            raise ValueError(f"expected min_size <= max_size, got {self.min_size} > {self.max_size}")
        return self

    @model_validator(mode="after")
    def _every_channel_has_its_numbers(self) -> Self:
        count = NUM_CHANNELS[self.channels]
        for key, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != count:
                raise ValueError(
                    f"expected {key} of {count} number(s), one for each channel of {self.channels!r}, "
                    f"got {list(numbers)}"
                )
        return self


def _ratios_for(given: object) -> str:
    """Which of the two forms the aspect ratios have, so that errors mention only that form."""
    return (
        "each map" if isinstance(given, list | tuple) and given and isinstance(given[0], list | tuple) else "all maps"
    )


class AnchorsConfig(_Table):
    """Anchors of the RPN: sides (pixels of the resized image) and height / width ratios for every feature map.

    Attributes:
        sizes: a list for every feature map.
        aspect_ratios: one list for all sizes of all maps; or a list for every feature map.
        style: `torchvision` rounds anchors to whole pixels and the strides of odd maps down; `detectron2` and
            `mmdetection` do neither. The anchors of a location are ordered by ratio, with `detectron2` by size.
    """

    style: Literal["torchvision", "detectron2", "mmdetection"] = "torchvision"
    sizes: Annotated[tuple[Annotated[tuple[AnchorSide, ...], Field(max_length=32)], ...], Field(max_length=16)] = (
        (32,),
        (64,),
        (128,),
        (256,),
        (512,),
    )
    aspect_ratios: Annotated[
        Annotated[Ratios, Tag("all maps")]
        | Annotated[tuple[Ratios, ...], Field(min_length=1, max_length=16), Tag("each map")],
        Discriminator(_ratios_for),
    ] = (0.5, 1.0, 2.0)

    @property
    def ratios_by_level(self) -> tuple[tuple[float, ...], ...]:
        """The aspect ratios of every feature map."""
        ratios = self.aspect_ratios
        own = tuple(one for one in ratios if isinstance(one, tuple))
        return own or (tuple(one for one in ratios if not isinstance(one, tuple)),) * len(self.sizes)

    @model_validator(mode="after")
    def _same_number_on_every_level(self) -> Self:
        # One RPN head serves every level, so the number of anchors per location must be the same on every level.
        ratios = self.ratios_by_level
        if len(ratios) != len(self.sizes):
            raise ValueError(
                f"expected aspect_ratios for the {len(self.sizes)} feature maps of sizes, got {len(ratios)}"
            )
        counts = [len(sizes) * len(level) for sizes, level in zip(self.sizes, ratios, strict=True)]
        if not counts or len(set(counts)) != 1 or not counts[0]:
            raise ValueError(
                f"expected the same number of sizes times aspect_ratios (at least 1) for every level, got {counts}"
            )
        return self

    @property
    def per_place(self) -> int:
        """Number of anchors at each location of each map."""
        return len(self.sizes[0]) * len(self.ratios_by_level[0])


class RPNConfig(_Table):
    """Region proposal network: proposals kept before and after non-maximum suppression, and how it is trained."""

    pre_nms_top_n_train: Count = 2000
    pre_nms_top_n_test: Count = 1000
    post_nms_top_n_train: Count = 2000
    post_nms_top_n_test: Count = 1000
    nms_thresh: Probability = 0.7
    score_thresh: Probability = 0.0
    fg_iou_thresh: Probability = 0.7
    bg_iou_thresh: Probability = 0.3
    batch_size_per_image: Count = 256
    positive_fraction: Probability = 0.5
    head_conv_depth: Annotated[int, Field(ge=1, le=8)] = 1


class ProposalsConfig(_Table):
    """Where a network without an RPN gets its proposals.

    Attributes:
        source: `caller`: every request supplies its own; `selective_search`: searched for if a request supplies none.
            Training always searches.
        mode: `fast` (about 2,000 boxes per photograph, as in R-CNN) or `quality` (more boxes, many times slower).
        search_width: width in pixels to which a picture is scaled before the search; R-CNN's code uses 500.
        max_count: maximum number of boxes kept per picture.
    """

    source: Literal["caller", "selective_search"] = "selective_search"
    mode: Literal["fast", "quality"] = "fast"
    search_width: Pixels = 500
    max_count: Count = 2000


class RoIBranchConfig(_Table):
    """Overrides of `[roi]` for the mask branch; None means the same value. A mask needs a square patch."""

    op: PatchOp | None = None
    sampling_ratio: Annotated[int, Field(ge=0, le=16)] | None = None
    aligned: bool | None = None


class RoIConfig(_Table):
    """The RoI head: the operator that extracts the features of each proposal, and the small networks after it.

    Attributes:
        op: the operator of the box branch, and of the mask branch unless `mask.op` overrides it.
        sampling_ratio: sampling points per bin side for the interpolating operators; 0 adapts to the box (not possible
            with `roi_warp`). Not used by `roi_pool` and `spp`.
        aligned: half-pixel shift of those operators, as in detectron2; torchvision's models use false.
        box_output_size: side of the patch for the box head. Not used by `spp`.
        spp_levels: sides of the grids of `spp`; the box head sees all their bins concatenated.
        crop_size: side in pixels to which `crop` warps each proposal.
        crop_padding: pixels of context around the proposal, included in `crop_size`.
        crops_per_chunk: number of crops per pass through the network when serving; memory grows with it.
        mask_output_size: side of the patch for the mask head; its masks have twice that side.
        box_head_convs: output channels of each 3 x 3 convolution of the box head; no convolutions by default.
        box_head_channels: width of the hidden layers of the box head: two, or one after convolutions. Not used if res5
            is the box head.
        box_head_dropout: dropout probability after those two layers in training.
        mask_head_channels: output channels of each 3 x 3 convolution of the mask head, the last one also for its
            transposed convolution. If res5 is the head, there are no 3 x 3 convolutions and this is one number.
        head_norm: norm after the convolutions of both heads, which then have no bias; no norm by default.
        mask: overrides for the mask branch.
        box_weights: weights of (dx, dy, dw, dh) in the box head's output, from Fast R-CNN's normalised targets.
        fg_iou_thresh, bg_iou_thresh, batch_size_per_image, positive_fraction: how proposals are sampled in training.
    """

    op: RoIOp = "roi_align"
    sampling_ratio: Annotated[int, Field(ge=0, le=16)] = 2
    aligned: bool = False
    box_output_size: Side = 7
    spp_levels: tuple[Side, ...] = Field((4, 2, 1), min_length=1, max_length=8)
    crop_size: Annotated[int, Field(ge=32, le=1024)] = 227
    crop_padding: Annotated[int, Field(ge=0, le=256)] = 16
    crops_per_chunk: Annotated[int, Field(ge=1, le=4096)] = 64
    mask_output_size: Side = 14
    box_head_convs: tuple[Channels, ...] = ()
    box_head_channels: Channels = 1024
    box_head_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mask_head_channels: tuple[Channels, ...] = (256, 256, 256, 256)
    head_norm: Norm | None = None
    mask: RoIBranchConfig = RoIBranchConfig()
    box_weights: tuple[Scale, Scale, Scale, Scale] = (10.0, 10.0, 5.0, 5.0)
    fg_iou_thresh: Probability = 0.5
    bg_iou_thresh: Probability = 0.5
    batch_size_per_image: Count = 512
    positive_fraction: Probability = 0.25

    @model_validator(mode="after")
    def _warping_has_points(self) -> Self:
        for key, branch in (("sampling_ratio", self), ("mask.sampling_ratio", self.mask_branch())):
            if branch.op == "roi_warp" and branch.sampling_ratio == 0:
                raise ValueError(f"expected {key} of 1 or more for roi_warp (1 is plain resampling), got 0")
        return self

    @model_validator(mode="after")
    def _padding_leaves_room(self) -> Self:
        if 2 * self.crop_padding >= self.crop_size:
            raise ValueError(
                f"expected crop_padding below half of crop_size, got {self.crop_padding} and {self.crop_size}"
            )
        return self

    @model_validator(mode="after")
    def _convolutions_have_a_square_patch(self) -> Self:
        if self.op == "spp" and self.box_head_convs:
            raise ValueError(f"expected op to be {_one_of(PatchOp)} before box_head_convs, got 'spp': a row of bins")
        return self

    @model_validator(mode="after")
    def _dropout_belongs_to_hidden_layers(self) -> Self:
        if self.box_head_dropout and self.box_head_convs:
            raise ValueError("'box_head_dropout' is for a box head of two hidden layers, got box_head_convs too")
        return self

    @property
    def box_bins(self) -> int:
        """Values per channel that the box head sees for each proposal."""
        return sum(side**2 for side in self.spp_levels) if self.op == "spp" else self.box_output_size**2

    def mask_branch(self) -> RoIConfig:
        """This configuration with the mask branch's overrides applied."""
        return self.model_copy(update=self.mask.model_dump(exclude_none=True))


class DetectionsConfig(_Table):
    """Which of the classified boxes are returned, unless the request says otherwise.

    Attributes:
        class_agnostic_nms: whether the better of two overlapping detections suppresses the other regardless of class,
            so that an object gets only one label.
    """

    score_thresh: Probability = 0.05
    nms_thresh: Probability = 0.5
    class_agnostic_nms: bool = False
    detections_per_img: Annotated[int, Field(ge=1, le=1000)] = 100


class MasksConfig(_Table):
    """How small masks become pixels of the image.

    Attributes:
        style: whose `paste_masks_in_image` spreads a mask over its box: `torchvision` over whole pixels, `detectron2`
            (and mmdetection) over the exact box.
    """

    style: Style = "torchvision"


class ModelConfig(_Table):
    """A whole network.

    Attributes:
        architecture: `faster_rcnn` (boxes) or `mask_rcnn` (boxes and masks), which have an RPN; `fast_rcnn` and `rcnn`
            (boxes), which need proposals as input.
        labels: class names without the background; `labels[i]` has id i + 1.

    Raises:
        pydantic.ValidationError: on an unknown key, a value out of range, or parts that do not fit each other.
    """

    architecture: Architecture
    labels: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(min_length=1)
    backbone: BackboneConfig
    transform: TransformConfig = TransformConfig()
    anchors: AnchorsConfig = AnchorsConfig()
    rpn: RPNConfig = RPNConfig()
    proposals: ProposalsConfig = ProposalsConfig()
    roi: RoIConfig = RoIConfig()
    detections: DetectionsConfig = DetectionsConfig()
    masks: MasksConfig = MasksConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_papers_numbers(cls, document: Any) -> Any:
        if not isinstance(document, Mapping):
            return document
        backbone = _written(document.get("backbone")).get("name")
        roi = _written(document.get("roi"))
        defaults = _paper_defaults(
            document.get("architecture"), str(backbone), has_convs=bool(roi.get("box_head_convs"))
        )
        filled = {
            table: {**numbers, **_written(document.get(table))}
            for table, numbers in defaults.items()
            if isinstance(document.get(table, {}), Mapping | _Table)  # anything else is rejected unchanged
        }
        return {**document, **filled}

    @field_validator("labels")
    @classmethod
    def _no_label_twice(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted(label for label, count in Counter(labels).items() if count > 1)
        if twice:
            raise ValueError(f"expected every label once, got twice: {', '.join(twice[:20])}")
        return labels

    @model_validator(mode="after")
    def _anchors_fit_the_pyramid(self) -> Self:
        if self.has_rpn and self.backbone.num_levels not in (None, len(self.anchors.sizes)):
            raise ValueError(
                f"expected anchors.sizes for the {self.backbone.num_levels} feature maps of {self.backbone.name}, "
                f"got {len(self.anchors.sizes)}"
            )
        return self

    @model_validator(mode="after")
    def _masks_have_a_square_patch(self) -> Self:
        if self.has_masks and self.roi.mask_branch().op == "spp":
            raise ValueError(
                f"expected roi.mask.op to be {_one_of(PatchOp)} beside roi.op = 'spp', which gives a row of bins and "
                "no square patch for masks; got none"
            )
        return self

    @model_validator(mode="after")
    def _res5_stands_alone(self) -> Self:
        if not self.backbone.has_res5_head or self.architecture == "rcnn":
            return self
        name, roi = self.backbone.name, self.roi
        if roi.op == "spp":
            raise ValueError(
                f"expected roi.op to be {_one_of(PatchOp)} with {name}, whose box head takes a square patch, got 'spp'"
            )
        if roi.box_head_convs or roi.box_head_dropout or roi.head_norm:
            raise ValueError(
                f"expected no roi.box_head_convs, roi.box_head_dropout or roi.head_norm with {name}, whose box head is "
                "res5, got one"
            )
        if self.has_masks and len(roi.mask_head_channels) != 1:
            raise ValueError(
                f"expected one number in roi.mask_head_channels with {name}, whose mask head is res5 and a transposed "
                f"convolution of so many channels, such as [256], got {list(roi.mask_head_channels)}"
            )
        return self

    @model_validator(mode="after")
    def _crops_are_for_rcnn(self) -> Self:
        name, op = self.backbone.name, self.roi.op
        if self.architecture != "rcnn":
            if op == "crop":
                raise ValueError(
                    f"expected roi.op to be {_one_of(PatchOp)} or spp with {name} and architecture = "
                    f"{self.architecture!r}, got 'crop', which is for architecture = 'rcnn'"
                )
        elif op != "crop":
            raise ValueError(f"expected roi.op = 'crop' with architecture = 'rcnn', got {op!r}")
        elif self.backbone.has_pyramid:
            known = ", ".join(one for one in get_args(BackboneName) if not one.endswith("_fpn"))
            raise ValueError(
                f"expected one of {known}, torchvision/<model> for architecture = 'rcnn': a crop needs no pyramid; "
                f"got {name}"
            )
        return self

    @model_validator(mode="after")
    def _every_key_counts(self) -> Self:
        defaults = _paper_defaults(self.architecture, self.backbone.name, has_convs=bool(self.roi.box_head_convs))
        for table, keys, reason in self._unused():
            part: _Table = getattr(self, table)
            for key in keys or type(part).model_fields:
                value, ordinary = getattr(part, key), type(part).model_fields[key].get_default()
                # A stored model has every key written out, so a default value means nothing.
                if value not in (ordinary, defaults.get(table, {}).get(key, ordinary)):
                    raise ValueError(f"'{table}.{key}' would not be used, as {reason}; leave it out, got {value!r}")
        return self

    def _unused(self) -> Iterator[tuple[str, tuple[str, ...], str]]:
        """Settings that this network ignores: table, keys (empty means all), and why."""
        name, roi = self.backbone.name, self.roi
        if not self.backbone.has_pyramid:
            yield "backbone", ("out_channels",), f"{name} has no pyramid"
        if name == "vgg16":
            yield "backbone", ("norm", "norm_eps"), "vgg16 has no norms"
        if self.backbone.timm_model is not None or self.backbone.torchvision_model is not None:
            yield "backbone", ("norm_eps",), f"{name} has its own"
        if self.has_rpn:
            yield "proposals", (), f"a {self.architecture} has an RPN"
        else:
            reason = f"a {self.architecture} has no RPN"
            yield "anchors", (), reason
            yield "rpn", (), reason
        if not self.has_masks:
            yield "roi", ("mask_output_size", "mask_head_channels", "mask"), f"a {self.architecture} has no masks"
            yield "masks", (), f"a {self.architecture} has no masks"
            if not roi.box_head_convs:
                yield "roi", ("head_norm",), "there are no convolutions in its heads"
        if self.backbone.has_res5_head:
            yield "roi", ("box_head_channels", "box_head_dropout"), f"{name} has res5 as its box head"
        if self.architecture != "rcnn":
            yield "roi", ("crop_size", "crop_padding", "crops_per_chunk"), "there are no crops"
            return
        yield "roi", ("sampling_ratio", "aligned", "spp_levels", "box_head_convs"), "an rcnn crops"
        if self.backbone.has_res5_head:
            yield "roi", ("box_output_size",), f"{name} has res5 as its box head"

    @property
    def num_classes(self) -> int:
        """Number of classes including the background."""
        return len(self.labels) + 1

    @property
    def has_masks(self) -> bool:
        """Whether there is a mask branch."""
        return self.architecture == "mask_rcnn"

    @property
    def has_rpn(self) -> bool:
        """Whether the network proposes boxes itself."""
        return self.architecture in ("faster_rcnn", "mask_rcnn")

    @property
    def needs_proposals(self) -> bool:
        """Whether every request must supply proposals."""
        return not self.has_rpn and self.proposals.source == "caller"

    def searching(self) -> ModelConfig:
        """The same network with selective search instead of the caller's proposals, for training and evaluation."""
        return self.model_copy(update={"proposals": self.proposals.model_copy(update={"source": "selective_search"})})


def _written(table: object) -> Mapping[str, Any]:
    """The keys that were set explicitly, in a document or in Python."""
    if isinstance(table, _Table):
        return table.model_dump(exclude_unset=True)
    return table if isinstance(table, Mapping) else {}


def _paper_defaults(architecture: object, backbone: str, *, has_convs: bool) -> dict[str, dict[str, Any]]:
    """Values, by table, for which a network's own papers differ from the defaults of torchvision's FPN models.

    Girshick 2015 (Fast R-CNN: VGG-16, 2 images of 64 RoIs), Ren et al. 2015 (Faster R-CNN: anchors, 300 proposals at
    test, 128 RoIs), He et al. 2017 (Mask R-CNN on C4: 5 scales, 64 RoIs); 12000 -> 2000 and 6000 are from Faster
    R-CNN's code. Girshick et al. 2014 (R-CNN).

    Args:
        has_convs: whether the box head begins with convolutions, unlike the papers' heads.
    """
    tables: dict[str, dict[str, Any]] = {"transform": {}, "anchors": {}, "rpn": {}, "roi": {}}
    if backbone == "mobilenet_v3_large_fpn":
        tables["anchors"] = {"sizes": ((32.0, 64.0, 128.0, 256.0, 512.0),) * 3}
        tables["rpn"] = {"score_thresh": 0.05}
    elif backbone == "vgg16":
        tables["transform"] = {"min_size": 600, "max_size": 1000}
        tables["anchors"] = {"sizes": ((128.0, 256.0, 512.0),)}
        tables["roi"] = {"batch_size_per_image": 128}
        if not has_convs:
            tables["roi"] |= {"box_head_channels": 4096, "box_head_dropout": 0.5}
    elif backbone.endswith(("_c4", "_c5")) or backbone.startswith("torchvision/"):
        tables["anchors"] = {"sizes": ((32.0, 64.0, 128.0, 256.0, 512.0),)}
        if backbone.endswith("_c4"):
            tables["roi"] = {"batch_size_per_image": 64, "box_output_size": 14, "mask_head_channels": (256,)}
    if backbone == "vgg16" or backbone.endswith("_c4"):
        tables["rpn"] = {"pre_nms_top_n_train": 12_000, "pre_nms_top_n_test": 6000, "post_nms_top_n_test": 300}
    if architecture in ("fast_rcnn", "rcnn"):
        tables["anchors"], tables["rpn"] = {}, {}
        tables["roi"] |= {"batch_size_per_image": 64}
    if architecture == "rcnn":
        tables["roi"] |= {"op": "crop"}
    return {name: numbers for name, numbers in tables.items() if numbers}


def _one_of(choices: object) -> str:
    """The values of a `Literal` in words."""
    return f"one of {', '.join(get_args(choices))}"
