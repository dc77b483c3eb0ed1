"""`[roi]`: the RoI operator, the heads, and how proposals are sampled in training."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from service.modeling.config.backbone import Norm
from service.modeling.config.table import Channels, Count, Probability, Scale, Side, Table, one_of

PatchOp = Literal["roi_pool", "roi_align", "roi_align_max", "roi_warp"]
RoIOp = Literal[PatchOp, "spp", "crop"]


class RoIBranchConfig(Table):
    """Overrides of `[roi]` for the mask branch; None means the same value. A mask needs a square patch."""

    op: PatchOp | None = None
    sampling_ratio: Annotated[int, Field(ge=0, le=16)] | None = None
    aligned: bool | None = None


class RoIConfig(Table):
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
            raise ValueError(f"expected op to be {one_of(PatchOp)} before box_head_convs, got 'spp': a row of bins")
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
