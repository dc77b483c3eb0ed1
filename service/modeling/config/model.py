"""`ModelConfig`: all tables of a network, and the rules between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from service.modeling.config.backbone import BackboneConfig, BackboneName
from service.modeling.config.paper_defaults import paper_defaults
from service.modeling.config.proposals import AnchorsConfig, ProposalsConfig, RPNConfig
from service.modeling.config.roi import PatchOp, RoIConfig
from service.modeling.config.table import Probability, Style, Table, one_of
from service.modeling.config.transform import TransformConfig

Architecture = Literal["faster_rcnn", "mask_rcnn", "fast_rcnn", "rcnn"]


class DetectionsConfig(Table):
    """Which of the classified boxes are returned, unless the request says otherwise.

    Attributes:
        class_agnostic_nms: whether the better of two overlapping detections suppresses the other regardless of class,
            so that an object gets only one label.
    """

    score_thresh: Probability = 0.05
    nms_thresh: Probability = 0.5
    class_agnostic_nms: bool = False
    detections_per_img: Annotated[int, Field(ge=1, le=1000)] = 100


class MasksConfig(Table):
    """How small masks become pixels of the image.

    Attributes:
        style: whose `paste_masks_in_image` spreads a mask over its box: `torchvision` over whole pixels, `detectron2`
            (and mmdetection) over the exact box.
    """

    style: Style = "torchvision"


class ModelConfig(Table):
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
        defaults = paper_defaults(
            document.get("architecture"), str(backbone), has_convs=bool(roi.get("box_head_convs"))
        )
        filled = {
            table: {**numbers, **_written(document.get(table))}
            for table, numbers in defaults.items()
            if isinstance(document.get(table, {}), Mapping | Table)  # anything else is rejected unchanged
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
                f"expected roi.mask.op to be {one_of(PatchOp)} beside roi.op = 'spp', which gives a row of bins and "
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
                f"expected roi.op to be {one_of(PatchOp)} with {name}, whose box head takes a square patch, got 'spp'"
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
                    f"expected roi.op to be {one_of(PatchOp)} or spp with {name} and architecture = "
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
        defaults = paper_defaults(self.architecture, self.backbone.name, has_convs=bool(self.roi.box_head_convs))
        for table, keys, reason in self._unused():
            part: Table = getattr(self, table)
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
    if isinstance(table, Table):
        return table.model_dump(exclude_unset=True)
    return table if isinstance(table, Mapping) else {}
