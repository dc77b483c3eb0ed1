"""What a checkpoint reveals about its network, and what it leaves open: the tables of a `model.toml` as far as names,
shapes and buffers determine them, each value with its source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from service.errors import ModelStoreError
from service.model_store.model_toml import validated
from service.modeling.config import ModelConfig

Tables = dict[str, Any]
"""A document of `model.toml`: its tables by name, plus `architecture` and `labels`."""

WEIGHTS = "the weights"
FILE = "the file"

# Settings that affect the results, in the order in which they are shown.
SHOWN = (
    "backbone.name",
    "backbone.norm",
    "backbone.norm_eps",
    "backbone.stride_in_1x1",
    "backbone.extra_blocks",
    "backbone.features_stop",
    "transform.style",
    "transform.channels",
    "transform.min_size",
    "transform.max_size",
    "transform.size_divisible",
    "transform.mean",
    "transform.std",
    "anchors.sizes",
    "anchors.aspect_ratios",
    "anchors.style",
    "rpn.pre_nms_top_n_test",
    "rpn.post_nms_top_n_test",
    "rpn.nms_thresh",
    "rpn.score_thresh",
    "roi.op",
    "roi.sampling_ratio",
    "roi.aligned",
    "roi.box_output_size",
    "roi.mask_output_size",
    "roi.box_weights",
    "detections.score_thresh",
    "detections.nms_thresh",
    "detections.detections_per_img",
    "masks.style",
)


@dataclass(slots=True)
class Findings:
    """The network of a checkpoint.

    Attributes:
        family: the code that wrote it: `torchvision`, `detectron2` or `mmdetection`.
        tables: what is known or assumed about the network.
        told: the keys of `tables`, such as `backbone.name`, that the file determines, with the source; all others are
            assumed.
        doubts: the keys without a sensible default, and the question to ask about each.
        notes: other things the owner should know.
    """

    family: str = "torchvision"
    tables: Tables = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def tell(self, table: str, source: str, **values: Any) -> None:
        """Set values that are known for certain."""
        self.assume(table, **values)
        self.told |= {f"{table}.{key}": source for key in values}

    def assume(self, table: str, **values: Any) -> None:
        """Set values that are usual, where nothing is known."""
        self.tables.setdefault(table, {}).update(values)

    def doubt(self, question: str, *keys: str) -> None:
        """Ask for keys."""
        self.doubts |= dict.fromkeys(keys, question)

    def get(self, key: str) -> Any:
        """The value of `table.key`, None where there is none."""
        table, _, name = key.partition(".")
        return self.tables.get(table, {}).get(name)

    def answered(self, given: Mapping[str, Any]) -> ModelConfig:
        """The complete network, with the owner's values in place of assumed ones.

        Args:
            given: a document of `model.toml`, or a part of one.

        Raises:
            ModelStoreError: it is not valid, or leaves a question open.
        """
        written = {f"{table}.{key}" for table, values in given.items() if isinstance(values, Mapping) for key in values}
        open_questions = {question for key, question in self.doubts.items() if key not in written}
        if open_questions:
            raise ModelStoreError("\n  ".join(["the weights leave open:", *sorted(open_questions)]))
        merged = {**self.tables, **{key: value for key, value in given.items() if not isinstance(value, Mapping)}}
        for table, values in given.items():
            if isinstance(values, Mapping):
                merged[table] = {**self.tables.get(table, {}), **values}
        return validated("the network", merged, ModelConfig)

    def rows(self, config: ModelConfig, given: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
        """The settings that affect the network's results: key, value, and its source.

        Args:
            given: as in `answered`.
        """
        for key in SHOWN:
            table, _, name = key.partition(".")
            if not _matters(config, table, name):
                continue
            value = getattr(getattr(config, table), name)
            if value is None:
                continue
            usual = self.told.get(key, f"assumed: {_USUAL[self.family]}")
            yield key, _shown(value), "given" if name in given.get(table, {}) else usual


def _matters(config: ModelConfig, table: str, name: str) -> bool:
    """Whether a setting applies to the network."""
    match name:
        case "mask_output_size":
            return config.has_masks
        case "style" if table == "masks":
            return config.has_masks
        case "stride_in_1x1":
            return config.backbone.has_bottlenecks
        case "extra_blocks":
            return config.backbone.has_pyramid
        case "norm":
            return config.backbone.name != "vgg16"
        case "norm_eps":
            return config.backbone.name != "vgg16" and "/" not in config.backbone.name
        case _:
            return table not in ("anchors", "rpn") or config.has_rpn


_USUAL = {
    "torchvision": "torchvision's default",
    "detectron2": "detectron2's model zoo",
    "mmdetection": "mmdetection's base configuration",
    "given": "the default of model.toml",
}


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_shown(item) for item in value)}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
