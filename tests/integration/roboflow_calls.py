"""Calls a server with Roboflow's own client and prints what it got as JSON. Runs in the client's environment, see
`tests/install_tools.sh`: `roboflow_calls.py URL PICTURE`, with a server for whose models see `test_roboflow.py`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import supervision as sv
from inference_sdk import InferenceConfiguration, InferenceHTTPClient
from inference_sdk.http.errors import HTTPCallErrorError
from PIL import Image

warnings.simplefilter("ignore")


def main(url: str, path: str) -> dict[str, Any]:
    client = InferenceHTTPClient(api_url=url, api_key="unused")
    said: dict[str, Any] = {
        "server": client.get_server_info().name,
        "models": asdict(client.list_loaded_models())["models"],
        "boxes": client.infer(path, model_id="fake-boxes/1"),
        "masks": client.infer(path, model_id="fake"),
        "pillow": client.infer(Image.open(path), model_id="fake/1"),
        "other_name": client.infer(path, model_id="fake@1")["predictions"],
        "async": asyncio.run(client.infer_async(path, model_id="fake/1")),
        "errors": {},
    }
    said["detections"] = described(said["masks"])
    said["detections_of_boxes"] = described(said["boxes"])

    def configured(**options: Any) -> InferenceHTTPClient:
        return InferenceHTTPClient(url, "unused").configure(InferenceConfiguration(**options))

    said["rle"] = configured(response_mask_format="rle").infer(path, model_id="fake/1")
    said["detections_of_rle"] = described(said["rle"])
    said["confident"] = configured(confidence_threshold=0.5).infer(path, model_id="fake/1")["predictions"]
    said["default"] = configured(confidence_threshold="default").infer(path, model_id="fake/1")["predictions"]
    said["filtered"] = configured(class_filter=["dog"], iou_threshold=0.4, max_detections=5).infer(
        path, model_id="fake/1"
    )
    said["several"] = configured(max_batch_size=8).infer([path, path, path], model_id="fake/1")
    said["downsized"] = configured(client_downsizing_disabled=False, default_max_input_size=32).infer(
        path, model_id="fake/1"
    )
    with client.use_api_v0():
        said["v0"] = client.infer([path, path], model_id="fake/1")
        said["v0_async"] = asyncio.run(client.infer_async(path, model_id="fake-boxes/1"))
    v0 = configured(confidence_threshold=50, response_mask_format="rle", visualize_labels=True).select_api_v0()
    said["v0_confident"] = v0.infer(path, model_id="fake/1")["predictions"]
    drawing = configured(format="image", visualize_labels=True, stroke_width=2).select_api_v0()
    said["v0_drawing"] = drawing.infer(path, model_id="fake/1")["visualization"][:4]
    with_key = configured(api_key_transport="header")
    said["transport"] = len(with_key.infer(path, model_id="fake/1")["predictions"])

    def failing(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except HTTPCallErrorError as error:
            said["errors"][name] = [error.status_code, error.api_message]

    failing("no model", lambda: client.infer(path, model_id="x/1"))
    failing("no image", lambda: client.infer("bm90IGFuIGltYWdl", model_id="fake/1"))
    failing("unknown label", lambda: configured(class_filter=["x"]).infer(path, model_id="fake/1"))
    failing("drawn", lambda: configured(visualize_predictions=True).infer(path, model_id="fake/1"))
    failing("v0 no model", lambda: drawing.infer(path, model_id="x/1"))
    failing("unload", lambda: client.unload_model("fake-boxes/1"))
    return said


def described(answer: dict[str, Any]) -> dict[str, Any]:
    """What `supervision` makes of an answer."""
    found = sv.Detections.from_inference(answer)
    compact = sv.Detections.from_inference(answer, compact_masks=True)
    areas = None if found.mask is None else found.mask.sum(axis=(1, 2)).tolist()
    kind = type(compact.mask).__name__
    masks = None if compact.mask is None else [kind, np.asarray(compact.mask.area).tolist()]
    return {
        "xyxy": found.xyxy.tolist(),
        "confidence": found.confidence.tolist(),
        "class_id": found.class_id.tolist(),
        "class_name": found.data["class_name"].tolist(),
        "areas": areas,
        "compact": masks,
    }


if __name__ == "__main__":
    json.dump(main(*sys.argv[1:]), sys.stdout)
