"""Check that a network computes what it should on this device, with this engine and precision: its outputs for two
fixed pictures are compared with those of the plain network, `eager` in float32 with PyTorch's own operators on the same
device.

Final detections can't be compared, because rounding decides which of two overlapping boxes is suppressed. Instead both
networks get the same anchors and proposals, and their scores, boxes and masks are compared one by one.

Shapes: see `service/modeling/parts.py`; T anchors or boxes compared in an image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from service.devices import Device
from service.errors import ModelStoreError
from service.modeling.box_regression import decode_boxes
from service.modeling.config import ModelConfig
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.transform import Transform
from service.structures import NOT_FINITE, UInt8Array, Verification, VerifiedValue

if TYPE_CHECKING:
    from service.modeling.parts import Parts

SIZE = (256, 352)
"""(height, width) of the pictures, which are not resized: a tenth of the pixels of a usual input."""

_PROPOSALS_PER_IMAGE = 100
_MASKS_PER_IMAGE = 20
TOLERANCES = {
    "float32": {"boxes": 0.01, "scores": 1e-3, "masks": 1e-3},
    "tf32": {"boxes": 1.0, "scores": 0.03, "masks": 0.03},
    "float16": {"boxes": 1.0, "scores": 0.03, "masks": 0.03},
    "bfloat16": {"boxes": 8.0, "scores": 0.2, "masks": 0.2},
}
"""Largest differences allowed: boxes in pixels of the pictures, scores and masks as probabilities."""
_NONE: Mapping[str, float] = {}


def fixed_pictures() -> Sequence[UInt8Array]:
    """Two (H, W, 3) pictures, always the same: colour gradients, discs and rectangles, and some noise."""
    height, width = SIZE
    ys, xs = np.mgrid[0:height, 0:width]
    pictures = []
    for seed in (1, 2):
        numbers = np.random.default_rng(seed)
        ramps = np.stack([xs / width, ys / height, (xs + ys) / (height + width)], axis=2)
        picture = 40 + 120 * ramps[:, :, numbers.permutation(3)]
        for index in range(12):
            y, x, side = numbers.integers(0, height), numbers.integers(0, width), numbers.integers(8, 70)
            is_disc = (ys - y) ** 2 + (xs - x) ** 2 < side**2 / 4
            is_rectangle = (abs(ys - y) < side / 2) & (abs(xs - x) < side / 3)
            picture[is_disc if index % 2 else is_rectangle] = numbers.integers(0, 256, 3)
        noisy = picture + numbers.normal(0, 8, picture.shape)
        pictures.append(np.ascontiguousarray(noisy.clip(0, 255).astype(np.uint8)))
    return pictures


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """The inputs that both networks are compared on, in pixels of the pictures.

    Attributes:
        anchors: (N, T) indices of anchors; None without an RPN.
        proposals: (L, 4) for each image.
        classes: (R,) the class whose box is compared.
        masks: boxes whose masks are compared; None without masks.
    """

    anchors: Tensor | None
    proposals: Sequence[Tensor]
    classes: Tensor
    masks: _GivenMasks | None

    def of_first_image(self) -> _Given:
        return _Given(
            None if self.anchors is None else self.anchors[:1],
            self.proposals[:1],
            self.classes[: len(self.proposals[0])],
            None if self.masks is None else self.masks.of_first_image(),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _GivenMasks:
    """(T, 4) boxes of each image, in pixels of the pictures, and (all T,) their classes."""

    boxes: Sequence[Tensor]
    labels: Tensor

    def of_first_image(self) -> _GivenMasks:
        return _GivenMasks(self.boxes[:1], self.labels[: len(self.boxes[0])])


@dataclass(frozen=True, slots=True, eq=False)
class _Answers:
    """Outputs in float32: probabilities, and boxes in pixels of the pictures; those of the anchors come first.

    Attributes:
        is_finite: whether all outputs of the parts and all boxes are finite.
    """

    scores: Sequence[Tensor]
    boxes: Sequence[Tensor]
    masks: Sequence[Tensor]
    is_finite: bool


class Reference:
    """The plain network's outputs, computed before an engine replaces its parts.

    Args:
        model: loaded, in evaluation mode, in float32, on its device. It can no longer be trained afterwards.
        config: the model's.
        device: where it is.
        int8_tolerances: the root mean squares allowed in int8: they are the model's own, not in `TOLERANCES`.

    Raises:
        ModelStoreError: its outputs for ordinary pictures are not finite.
    """

    def __init__(
        self,
        model: GeneralizedRCNN,
        *,
        config: ModelConfig,
        device: Device,
        int8_tolerances: Mapping[str, float] = _NONE,
    ) -> None:
        started = time.perf_counter()
        self._device = device
        self._tolerances: Mapping[str, Mapping[str, float]] = TOLERANCES | {"int8": int8_tolerances}
        model.requires_grad_(False)
        size = {"min_size": min(SIZE), "max_size": max(SIZE)}
        transform = Transform(config.transform.model_copy(update=size)).to(device.torch_device)
        # While gradients are enabled, RoIs are pooled by PyTorch's operators instead of our kernels.
        with device.use("float32"), torch.enable_grad():
            self._batch = transform.prepare([device.upload(torch.from_numpy(one)) for one in fixed_pictures()]).tensors
            self._given = _choose(model, self._batch)
            self._answers = _ask(model, model.own_parts(), self._batch, self._given)
            if not self._answers.is_finite:
                raise ModelStoreError("the network computes infinities or NaN from an ordinary picture")
        self._seconds = time.perf_counter() - started

    def hold(self, model: GeneralizedRCNN, *, engine: str, precision: str) -> Verification:
        """Compare the network as it runs now with the reference, on both pictures together and on the first one alone.

        Args:
            model: the same network, run by an engine.
            engine: its name.
            precision: a key of `TOLERANCES`, or int8.
        """
        started = time.perf_counter()
        parts = model.parts or model.own_parts()
        measure = _root_mean_square if precision == "int8" else _largest
        with self._device.use(precision), torch.inference_mode():
            together = _ask(model, parts, self._batch, self._given)
            alone = _ask(model, parts, self._batch[:1], self._given.of_first_image())
            values = {
                name: VerifiedValue(
                    difference=max(
                        _difference(ours, theirs, measure=measure)
                        for answers in (together, alone)
                        for ours, theirs in zip(getattr(answers, name), getattr(self._answers, name), strict=True)
                    ),
                    tolerance=tolerance,
                )
                for name, tolerance in self._tolerances[precision].items()
                if getattr(together, name)
            }
        return Verification(
            engine=engine, precision=precision, values=values, seconds=self._seconds + time.perf_counter() - started
        )


def _difference(ours: Tensor, theirs: Tensor, *, measure: Callable[[Tensor], Tensor]) -> float:
    """As in `VerifiedValue`. If `ours` covers fewer images, its rows match the first rows of `theirs`."""
    ours, theirs = ours.float(), theirs[: len(ours)].float()
    if not ours.isfinite().all():
        return NOT_FINITE
    if not ours.numel():
        return 0.0
    return float(measure(ours - theirs))


def _largest(differences: Tensor) -> Tensor:
    return differences.abs().max()


def _root_mean_square(differences: Tensor) -> Tensor:
    """For int8, of which single values may be anything: the pictures have colours that no calibration has seen."""
    return differences.square().mean().sqrt()


def _choose(model: GeneralizedRCNN, batch: Tensor) -> _Given:
    """The plain network's best anchors and proposals, or a grid of boxes if it has no RPN."""
    parts = model.own_parts()
    sizes = [(batch.shape[-2], batch.shape[-1])] * len(batch)
    anchors = None
    if not model.has_rpn:
        features = parts.backbone(batch)
        proposals = [_grid(batch)] * len(batch)
    else:
        output = parts.trunk(batch)
        features = output.features
        anchors = output.objectness.topk(min(_PROPOSALS_PER_IMAGE, output.objectness.shape[1]), dim=1).indices
        grid_sizes = [(one.shape[-2], one.shape[-1]) for one in features.values()]
        proposed = model.rpn.propose(
            output.objectness, output.deltas, padded_size=sizes[0], grid_sizes=grid_sizes, image_sizes=sizes
        )
        proposals = [one[:_PROPOSALS_PER_IMAGE] for one in proposed]
    pooled = model.roi_heads.box_roi_pool(features, proposals, sizes)
    class_logits, box_regression = parts.box_head(pooled)
    classes = class_logits[:, 1:].argmax(dim=1) + 1
    masks = None
    if parts.mask_head is not None:
        boxes = _boxes_of(model, box_regression, classes, proposals, sizes[0])
        counts = [len(one) for one in proposals]
        masks = _GivenMasks(
            [one[:_MASKS_PER_IMAGE] for one in boxes.split(counts)],
            torch.cat([one[:_MASKS_PER_IMAGE] for one in classes.split(counts)]),
        )
    return _Given(anchors, proposals, classes, masks)


def _ask(model: GeneralizedRCNN, parts: Parts, batch: Tensor, given: _Given) -> _Answers:
    """A network's outputs for the given anchors, proposals and boxes."""
    height, width = batch.shape[-2], batch.shape[-1]
    sizes = [(height, width)] * len(batch)
    scores, boxes, masks = [], [], []
    outputs: list[Tensor] = []
    if given.anchors is None:
        features = parts.backbone(batch)
    else:
        output = parts.trunk(batch)
        features = output.features
        grid_sizes = [(one.shape[-2], one.shape[-1]) for one in features.values()]
        anchors = model.rpn.lay_anchors((height, width), grid_sizes, batch.device)[given.anchors]
        deltas = output.deltas.gather(1, given.anchors.unsqueeze(2).expand(-1, -1, 4)).float()
        outputs += [output.objectness, output.deltas]
        scores.append(output.objectness.float().sigmoid())
        decoded = decode_boxes(model.rpn.box_coder, deltas.flatten(end_dim=1), anchors.flatten(end_dim=1))
        boxes.append(_clipped(decoded, height, width))
    pooled = model.roi_heads.box_roi_pool(features, given.proposals, sizes)
    class_logits, box_regression = parts.box_head(pooled)
    outputs += [class_logits, box_regression]
    scores.append(class_logits.float().softmax(-1))
    boxes.append(_boxes_of(model, box_regression, given.classes, given.proposals, (height, width)))
    is_finite = all(bool(one.isfinite().all()) for one in (*outputs, *boxes))
    if given.masks is not None and parts.mask_head is not None:
        pooled = model.roi_heads.mask_roi_pool(features, given.masks.boxes, sizes)
        logits = parts.mask_head(pooled, given.masks.labels)
        is_finite &= bool(logits.isfinite().all())
        masks.append(logits.float().sigmoid())
    return _Answers(scores, boxes, masks, is_finite)


def _boxes_of(
    model: GeneralizedRCNN, box_regression: Tensor, classes: Tensor, proposals: Sequence[Tensor], size: tuple[int, int]
) -> Tensor:
    """(R, 4), each proposal's box of one class."""
    rows = torch.arange(len(classes), device=classes.device)
    regression = box_regression.float().reshape(len(box_regression), box_regression.shape[1] // 4, 4)[rows, classes]
    return _clipped(decode_boxes(model.roi_heads.box_coder, regression, torch.cat(list(proposals))), *size)


def _clipped(boxes: Tensor, height: int, width: int) -> Tensor:
    limits = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
    return torch.minimum(boxes.clamp(min=0), limits)


def _grid(batch: Tensor) -> Tensor:
    """(8, 4) boxes of two sizes in the corners of a picture. Few, because R-CNN runs its whole network on each."""
    height, width = batch.shape[-2], batch.shape[-1]
    boxes = [
        [x, y, x + side, y + side] for side in (48.0, 120.0) for y in (0.0, height - side) for x in (0.0, width - side)
    ]
    return torch.tensor(boxes, device=batch.device)
