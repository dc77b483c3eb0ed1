"""The options of a detection as keyword arguments, and the query that they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt


class DetectOptions(TypedDict, total=False):
    """The options of a detection. One that is left out, or None, has the default of the model or of the server.

    Attributes:
        model: a name, or `name@version`.
        score_thresh: keep detections that score above this, 0 to 1.
        max_detections: keep at most this many, best first.
        labels: keep only these.
        masks: the form of the masks in the answer; `Mask.to_numpy` reads all of them. `none` saves their work.
        nms_thresh: of two detections of a class that overlap by more than this IoU, the better stays.
        class_agnostic_nms: whether a detection suppresses those of other classes, too.
        roi_op: another RoI operator for this request, where the server allows it.
        intensity: what is white in 16-bit grey: 65535, or the picture's own largest value.
        extras: further outputs of each detection: `class_scores`.
        proposals: (N, 4) boxes (x1, y1, x2, y2) in pixels, to classify and refine instead of the model's own proposals.
    """

    model: str | None
    score_thresh: float | None
    max_detections: int | None
    labels: Sequence[str] | None
    masks: Literal["rle", "polygons", "png", "crop", "none"] | None
    nms_thresh: float | None
    class_agnostic_nms: bool | None
    roi_op: str | None
    intensity: Literal["full", "stretch"] | None
    extras: Literal["class_scores"] | None
    proposals: Sequence[Sequence[float]] | npt.NDArray[Any] | None


class AnnotateOptions(DetectOptions, total=False):
    """The options of a drawn picture.

    Attributes:
        format: of the picture.
        draw: what to draw, separated by commas, such as `masks,labels`.
    """

    format: Literal["png", "jpeg"] | None
    draw: str | None


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, str | list[str]], list[list[float]] | None]:
    """The query of a request, and the proposals, which are too long for one.

    Names are not checked here: the server knows its options, and may be newer than this package.

    Raises:
        ValueError: an empty list of labels, which a query cannot express.
    """
    given = {name: value for name, value in options.items() if value is not None}
    proposals = given.pop("proposals", None)
    query = {name: _text(name, value) for name, value in given.items()}
    return query, None if proposals is None else np.asarray(proposals, np.float64).reshape(-1, 4).tolist()


def _text(name: str, value: Any) -> str | list[str]:
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, str) or not isinstance(value, Sequence):
        return str(value)
    if not value:
        raise ValueError(f"{name}: expected at least one, got an empty list; leave the option out for all")
    return [str(one) for one in value]
