"""`[anchors]`, `[rpn]` and `[proposals]`: where the proposals come from."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from service.modeling.config.table import Count, Pixels, Probability, Table

# Anchors are computed at every location of every map, so a long list costs memory and time for every picture.
AnchorSide = Annotated[float, Field(gt=0, le=65_536)]
Ratio = Annotated[float, Field(gt=0, le=1000)]
Ratios = Annotated[tuple[Ratio, ...], Field(min_length=1, max_length=32)]


def _ratios_for(given: object) -> str:
    """Which of the two forms the aspect ratios have, so that errors mention only that form."""
    return (
        "each map" if isinstance(given, list | tuple) and given and isinstance(given[0], list | tuple) else "all maps"
    )


class AnchorsConfig(Table):
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


class RPNConfig(Table):
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


class ProposalsConfig(Table):
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
