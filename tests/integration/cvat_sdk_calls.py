"""What CVAT's SDK makes of `examples/cvat_function.py`, as one JSON document on standard output. A program, for the SDK
wants packages of other versions than our tests do: `tests/install_tools.sh` gives it an environment of its own.

    python cvat_sdk_calls.py URL KEY PICTURE
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

import cvat_sdk.auto_annotation as cvataa
import cvat_sdk.models as models
import PIL.Image
from cvat_sdk.auto_annotation.driver import _AnnotationMapper, _DetectionFunctionContextImpl
from cvat_sdk.masks import decode_mask

URL, KEY, PICTURE = sys.argv[1], sys.argv[2], PIL.Image.open(sys.argv[3])
FUNCTION = Path(__file__).parents[2] / "examples/cvat_function.py"


def shapes_for(function: Any, *, threshold: float | None = None, as_polygons: bool = False) -> list[list[Any]]:
    """Type, label and points of each shape, as `cvat_sdk.auto_annotation.annotate_task` would upload them to a task."""
    labels = [
        models.Label(name=name, id=id, type="any", attributes=[], sublabels=[])
        for id, name in ((101, "cat"), (102, "dog"))
    ]
    mapper = _AnnotationMapper(
        logging.getLogger(),
        function.spec.labels,
        labels,
        allow_unmatched_labels=False,
        conv_mask_to_poly=as_polygons,
    )
    context = _DetectionFunctionContextImpl(frame_name="a", conf_threshold=threshold, conv_mask_to_poly=as_polygons)
    _, shapes = mapper.validate_and_remap(function.detect(context, PICTURE), 7)
    assert all((shape.frame, shape.source) == (7, "auto") for shape in shapes)
    return [[shape.type.value, shape.label_id, shape.points] for shape in shapes]


def main() -> None:
    spec = importlib.util.spec_from_file_location("cvat_function", FUNCTION)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    masks, boxes = (module.create(url=URL, model=name, key=KEY) for name in ("fake", "fake-boxes"))
    assert isinstance(masks.spec, cvataa.DetectionFunctionSpec)
    found = shapes_for(masks, threshold=0.5)
    answer = {
        "labels": {
            name: [[label.name, label.id, label.type] for label in function.spec.labels]
            for name, function in (("fake", masks), ("fake-boxes", boxes))
        },
        "rectangles": shapes_for(boxes),
        "masks": found,
        "pixels": int(decode_mask(found[0][2], image_width=PICTURE.width, image_height=PICTURE.height).sum()),
        "polygons": shapes_for(masks, threshold=0.5, as_polygons=True),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
