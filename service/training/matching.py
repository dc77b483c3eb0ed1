"""COCO's matching of detections to objects, as pycocotools has it, in machine code: in Python it takes as long as the
network that is evaluated.

Shapes: T thresholds of IoU; D detections and G objects of one class in one image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

from service.jit import compiled

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class CompiledCOCOeval(COCOeval):  # type: ignore[misc]  # pycocotools has no annotations
    """pycocotools' evaluation of boxes or masks, with the same results."""

    def evaluateImg(self, imgId: int, catId: int, aRng: list[float], maxDet: int) -> dict[str, Any] | None:
        """See pycocotools."""
        objects, found = self._gts[imgId, catId], self._dts[imgId, catId]
        if not objects and not found:
            return None
        ignored = np.array([bool(one["ignore"]) or not aRng[0] <= one["area"] <= aRng[1] for one in objects], bool)
        object_order = np.argsort(ignored, kind="stable")
        objects, ignored = [objects[index] for index in object_order], ignored[object_order]
        order = np.argsort([-one["score"] for one in found], kind="stable")[:maxDet]
        found = [found[index] for index in order]
        thresholds = np.asarray(self.params.iouThrs, np.float64)
        object_of = np.full((len(thresholds), len(found)), -1)
        detection_of = np.full((len(thresholds), len(objects)), -1)
        if objects and found:
            crowds = np.array([bool(one["iscrowd"]) for one in objects], bool)
            ious = np.ascontiguousarray(self.ious[imgId, catId][: len(found), object_order])
            _match(ious, ignored, crowds, np.minimum(thresholds, 1 - 1e-10), object_of, detection_of)
        outside = np.array([not aRng[0] <= one["area"] <= aRng[1] for one in found], bool)
        is_ignored = np.where(object_of >= 0, _taken(ignored, object_of).astype(bool), outside)
        object_ids, ids = [one["id"] for one in objects], [one["id"] for one in found]
        return {
            "image_id": imgId,
            "category_id": catId,
            "aRng": aRng,
            "maxDet": maxDet,
            "dtIds": ids,
            "gtIds": object_ids,
            "dtMatches": _taken(object_ids, object_of),
            "gtMatches": _taken(ids, detection_of),
            "dtScores": [one["score"] for one in found],
            "gtIgnore": ignored,
            "dtIgnore": is_ignored,
        }


def _taken(values: Any, indices: NDArray[np.int64]) -> Floats:
    """The values at the indices, 0 at -1."""
    return np.append(np.asarray(values, np.float64), 0.0)[indices]


@compiled()
def _match(
    ious: Floats,
    ignored: Bools,
    crowds: Bools,
    thresholds: Floats,
    object_of: NDArray[np.int64],
    detection_of: NDArray[np.int64],
) -> None:
    """Give each detection the object with the highest IoU that is still free.

    Args:
        ious: (D, G), the best detection first.
        ignored: (G,), the ignored objects last; they are matched only by what matches no other object.
        crowds: (G,) objects that any number of detections may match.
        thresholds: (T,) least IoU of a match.
        object_of: (T, D), filled with indices of objects; -1 stays where there is none.
        detection_of: (T, G), filled with indices of detections.
    """
    for threshold in range(len(thresholds)):
        for detection in range(len(ious)):
            best, match = thresholds[threshold], -1
            for index in range(len(ignored)):
                if detection_of[threshold, index] >= 0 and not crowds[index]:
                    continue
                if match >= 0 and not ignored[match] and ignored[index]:
                    break
                # The last of equals, as in pycocotools.
                if ious[detection, index] >= best:
                    best, match = ious[detection, index], index
            if match >= 0:
                object_of[threshold, detection] = match
                detection_of[threshold, match] = detection
