"""Annotates tasks of CVAT with a model of a running server, from the command line and without CVAT's administrator:

    pip install cvat-cli 'cvat-sdk[masks]'
    cvat-cli --server-host https://app.cvat.ai --auth USER task auto-annotate 42 --allow-unmatched-labels \
        --function-file cvat_function.py -p url=str:http://localhost:8000 -p model=str:nuclei

The labels of the task must be of the type mask or any; with --conv-mask-to-poly, polygon or any; for a model without
masks, or with `-p model=str:nuclei.boxes`, rectangle or any.
"""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from collections.abc import Sequence
from typing import Any

import cvat_sdk.auto_annotation as cvataa
import cvat_sdk.models as models
import numpy as np
import PIL.Image
from cvat_sdk.masks import encode_mask


class Detector:
    def __init__(self, url: str, model: str, key: str) -> None:
        self._url, self._model, self._key = url.rstrip("/"), model, key
        function = self._ask(f"/api/functions/{model}")
        labels = json.loads(function["metadata"]["annotations"]["spec"])
        self._ids = {one["name"]: one["id"] for one in labels}
        self.spec = cvataa.DetectionFunctionSpec(
            labels=[cvataa.label_spec(one["name"], one["id"], type=one["type"]) for one in labels]
        )

    def detect(
        self, context: cvataa.DetectionFunctionContext, image: PIL.Image.Image
    ) -> Sequence[models.LabeledShapeRequest]:
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
        body = {"image": base64.b64encode(file.getvalue()).decode(), "threshold": context.conf_threshold}
        return [self._shape(one, context.conv_mask_to_poly) for one in self._ask("/api/function_invocations", body)]

    def _shape(self, one: dict[str, Any], as_polygon: bool) -> models.LabeledShapeRequest:
        label = self._ids[one["label"]]
        if one["type"] == "rectangle":
            return cvataa.rectangle(label, one["points"])
        if as_polygon:
            return cvataa.polygon(label, [float(number) for number in one["points"]])
        *pixels, left, top, right, bottom = one["mask"]
        bitmap = np.array(pixels, bool).reshape(bottom - top + 1, right - left + 1)
        runs = encode_mask(bitmap, [0, 0, *reversed(bitmap.shape)])[:-4]
        return cvataa.mask(label, [float(number) for number in (*runs, left, top, right, bottom)])

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"x-nuclio-function-name": self._model, "Content-Type": "application/json"}
        if self._key:
            headers["X-API-Key"] = self._key
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self._url + path, data, headers), timeout=120) as answer:
            return json.load(answer)


def create(url: str = "http://localhost:8000", model: str = "nuclei", key: str = "") -> Detector:
    return Detector(url, model, key)
