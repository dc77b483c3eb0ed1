"""`ModelConfig`: everything that is needed to rebuild a network, as `model.toml` writes it down. Read by `build.py`,
checked and stored by `service/model_store`. Defaults are torchvision's for `fasterrcnn_resnet50_fpn` unless said.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Architecture = Literal["faster_rcnn", "mask_rcnn"]
BackboneName = Literal[
    "resnet18_fpn",
    "resnet34_fpn",
    "resnet50_fpn",
    "resnet101_fpn",
    "narrow_resnet18_fpn",
    "mobilenet_v3_large_fpn",
    "resnet50_c4",
    "resnet101_c4",
    "resnet50_c5",
    "resnet101_c5",
    "narrow_resnet18_c5",
    "vgg16",
]
Norm = Literal["batch_norm", "frozen_batch_norm"]
PatchOp = Literal["roi_pool", "roi_align", "roi_align_max", "roi_warp"]
RoIOp = Literal[PatchOp, "spp"]
Probability = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(ge=1, le=8192)]
Channels = Annotated[int, Field(ge=1, le=4096)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Side = Annotated[int, Field(ge=1, le=64)]
Triple = tuple[float, float, float]


class _Table(BaseModel):
    """A table of `model.toml`: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BackboneConfig(_Table):
    """Which trunk makes the feature maps.

    Attributes:
        name: torchvision's trunk with its feature pyramid (`narrow_resnet18_fpn`: ResNet-18 with `width` channels in
            its first stage instead of 64); or one map of stride 16: `resnet*_c4`'s conv4, with res5 behind the RoI
            pooler as the box head, or `vgg16`'s conv5_3; or one of stride 32: `*_c5`'s conv5.
        out_channels: channels of every feature map of the pyramid. Not used without a pyramid.
        width: channels of the first stage, for the narrow trunks only.
        norm: `batch_norm` trains its statistics (from scratch, with enough images a step), `frozen_batch_norm`
            keeps those that were loaded (fine-tuning with few images a step). `vgg16` has no norms.
        norm_eps: added to the variance in the trunk's norms; 0 in torchvision's published `*_resnet50_fpn` detectors.
        fpn_norm: norm behind the pyramid's convolutions, which then have no bias; none if not named.
        stride_in_1x1: the strided bottleneck of a stage strides in its first convolution, 1 x 1, as detectron2's MSRA
            weights have it, not in its 3 x 3 as torchvision's.
    """

    name: BackboneName
    out_channels: Channels = 256
    width: Channels | None = None
    norm: Norm = "frozen_batch_norm"
    norm_eps: Annotated[float, Field(ge=0, le=1)] = 1e-5
    fpn_norm: Norm | None = None
    stride_in_1x1: bool = False

    @model_validator(mode="after")
    def _stride_belongs_to_bottlenecks(self) -> Self:
        if self.stride_in_1x1 and not self.name.startswith(("resnet50_", "resnet101_")):
            raise ValueError(f"'stride_in_1x1' is for resnet50_* and resnet101_*, got name={self.name!r}")
        return self

    @model_validator(mode="after")
    def _pyramid_norm_belongs_to_a_pyramid(self) -> Self:
        if self.fpn_norm and not self.name.endswith("_fpn"):
            raise ValueError(f"'fpn_norm' is for the backbones named *_fpn, got name={self.name!r}")
        return self

    @model_validator(mode="after")
    def _width_belongs_to_the_narrow_trunk(self) -> Self:
        if (self.width is not None) != self.name.startswith("narrow_"):
            raise ValueError(
                f"'width' is for narrow_resnet18_*, which need it; got name={self.name!r}, width={self.width}"
            )
        return self

    @property
    def num_levels(self) -> int:
        """Feature maps that the RPN sees, a pyramid's extra max-pooled one included."""
        if not self.name.endswith("_fpn"):
            return 1
        return 3 if self.name == "mobilenet_v3_large_fpn" else 5

    @property
    def has_res5_head(self) -> bool:
        """Whether the trunk's last stage, res5, is the box head."""
        return self.name.endswith("_c4")


class TransformConfig(_Table):
    """How pixels become the network's input: scaled to 0..1, normalised, and resized so that the shorter side is
    `min_size` pixels unless the longer one would then exceed `max_size`.
    """

    min_size: Pixels = 800
    max_size: Pixels = 1333
    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _min_is_not_above_max(self) -> Self:
        if self.min_size > self.max_size:
            raise ValueError(f"expected min_size <= max_size, got {self.min_size} > {self.max_size}")
        if min(self.std) <= 0:
            raise ValueError(f"expected std > 0, got {self.std}")
        return self


class AnchorsConfig(_Table):
    """Anchors of the RPN: for every feature map its sides (pixels of the resized image) and height / width ratios.

    Attributes:
        style: `torchvision` rounds anchors to whole pixels and the strides of odd maps down, `detectron2` does neither.
    """

    style: Literal["torchvision", "detectron2"] = "torchvision"
    sizes: tuple[tuple[Annotated[float, Field(gt=0)], ...], ...] = ((32,), (64,), (128,), (256,), (512,))
    aspect_ratios: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 1.0, 2.0)

    @field_validator("sizes")
    @classmethod
    def _same_number_on_every_level(cls, sizes: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        # One RPN head serves every level, so its number of anchors per place must be one number.
        if not sizes or len({len(level) for level in sizes}) != 1 or not sizes[0]:
            raise ValueError(f"expected the same number of sizes (at least 1) for every level, got {sizes}")
        return sizes


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


class RoIBranchConfig(_Table):
    """What the mask branch does differently from `[roi]`; None means the same. A mask needs a square patch."""

    op: PatchOp | None = None
    sampling_ratio: Annotated[int, Field(ge=0, le=16)] | None = None
    aligned: bool | None = None


class RoIConfig(_Table):
    """The RoI head: which operator cuts the features of each proposal, and the small networks behind it.

    Attributes:
        op: the operator of the box branch, and of the mask branch unless `mask.op` says otherwise.
        sampling_ratio: points a bin side that the interpolating operators read; 0 adapts to the box, which `roi_warp`
            cannot. Not used by `roi_pool` and `spp`.
        aligned: half-pixel shift of those operators (detectron2's); torchvision's models have false.
        box_output_size: side of the patch for the box head. Not used by `spp`.
        spp_levels: sides of the grids of `spp`, whose bins the box head sees in one row.
        mask_output_size: side of the patch for the mask head; its masks have twice that.
        box_head_convs: output channels of each 3 x 3 convolution of the box head; none if not named.
        box_head_channels: width of the hidden layers of the box head: two, or one behind convolutions. Not used where
            res5 is the box head.
        box_head_dropout: share of those two layers' values that training drops.
        mask_head_channels: output channels of each 3 x 3 convolution of the mask head, and the last of them also of its
            transposed convolution. Where res5 is the head there are no others, and this is one number.
        head_norm: norm behind the convolutions of both heads, which then have no bias; none if not named.
        mask: what the mask branch does differently.
        fg_iou_thresh, bg_iou_thresh, batch_size_per_image, positive_fraction: how proposals are sampled in training.
    """

    op: RoIOp = "roi_align"
    sampling_ratio: Annotated[int, Field(ge=0, le=16)] = 2
    aligned: bool = False
    box_output_size: Side = 7
    spp_levels: tuple[Side, ...] = Field((4, 2, 1), min_length=1, max_length=8)
    mask_output_size: Side = 14
    box_head_convs: tuple[Channels, ...] = ()
    box_head_channels: Channels = 1024
    box_head_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mask_head_channels: tuple[Channels, ...] = (256, 256, 256, 256)
    head_norm: Norm | None = None
    mask: RoIBranchConfig = RoIBranchConfig()
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
        """Values a channel that the box head sees of each proposal."""
        return sum(side**2 for side in self.spp_levels) if self.op == "spp" else self.box_output_size**2

    def mask_branch(self) -> RoIConfig:
        """This configuration with the operator that the mask branch uses."""
        return self.model_copy(update=self.mask.model_dump(exclude_none=True))


class DetectionsConfig(_Table):
    """Which of the classified boxes are answered, unless the request says otherwise."""

    score_thresh: Probability = 0.05
    nms_thresh: Probability = 0.5
    detections_per_img: Annotated[int, Field(ge=1, le=1000)] = 100


class ModelConfig(_Table):
    """A whole network.

    Attributes:
        architecture: `faster_rcnn` (boxes) or `mask_rcnn` (boxes and masks).
        labels: class names without the background; `labels[i]` has the id i + 1.

    Raises:
        pydantic.ValidationError: on an unknown key, a value out of range, or parts that do not fit each other.
    """

    architecture: Architecture
    labels: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(min_length=1)
    backbone: BackboneConfig
    transform: TransformConfig = TransformConfig()
    anchors: AnchorsConfig = AnchorsConfig()
    rpn: RPNConfig = RPNConfig()
    roi: RoIConfig = RoIConfig()
    detections: DetectionsConfig = DetectionsConfig()

    @field_validator("labels")
    @classmethod
    def _no_label_twice(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"expected every label once, got twice: {', '.join(twice)}")
        return labels

    @model_validator(mode="after")
    def _anchors_fit_the_pyramid(self) -> Self:
        if len(self.anchors.sizes) != self.backbone.num_levels:
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
        if not self.backbone.has_res5_head:
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

    @property
    def num_classes(self) -> int:
        """Classes with the background."""
        return len(self.labels) + 1

    @property
    def has_masks(self) -> bool:
        """Whether there is a mask branch."""
        return self.architecture == "mask_rcnn"


def _one_of(choices: object) -> str:
    """The values of a `Literal` in words."""
    return f"one of {', '.join(get_args(choices))}"
