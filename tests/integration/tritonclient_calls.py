"""What `tritonclient` says to a server, as one JSON document on standard output. A program, for the client wants
packages of other versions than our tests do: `tests/install_tools.sh` gives it an environment of its own.

    python tritonclient_calls.py HOST:PORT PICTURE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

URL, PICTURE = sys.argv[1], Path(sys.argv[2]).read_bytes()
NAMES = ("boxes", "labels", "scores", "masks", "image_index")


def encoded(*images: bytes) -> list[Any]:
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, np.object_))
    return [tensor]


def pixels(array: Any, *, binary: bool = True) -> list[Any]:
    tensor = triton.InferInput("image", list(array.shape), "UINT8")
    tensor.set_data_from_numpy(array, binary_data=binary)
    return [tensor]


def found(result: Any) -> dict[str, Any]:
    """Of each array its shape, its type and its first numbers."""
    arrays = {name: result.as_numpy(name) for name in NAMES}
    return {
        name: [list(one.shape), str(one.dtype), one.ravel().tolist()[:8]]
        for name, one in arrays.items()
        if one is not None
    }


def error_of(call: Any) -> list[str]:
    try:
        call()
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return ["no error", ""]


def main() -> None:
    admin = {"Authorization": "Bearer " + "a" * 32}
    client = triton.InferenceServerClient(URL)
    red = np.zeros((2, 48, 64, 3), np.uint8)
    red[0, :, :, 0], red[1, :, :, 0] = 204, 102
    asked = [triton.InferRequestedOutput("scores", binary_data=False), triton.InferRequestedOutput("boxes")]
    answer = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": [client.is_model_ready("fake"), client.is_model_ready("fake", "1"), client.is_model_ready("x")],
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata("fake", "1"),
        "config": client.get_model_config("fake"),
        "encoded": found(client.infer("fake", encoded(PICTURE), request_id="my-1")),
        "id": client.infer("fake", encoded(PICTURE), request_id="my-1").get_response()["id"],
        "pixels": found(client.infer("fake", pixels(red))),
        "pixels_in_json": found(client.infer("fake", pixels(red[:1, :8, :8].copy(), binary=False))),
        "chosen": found(client.infer("fake", encoded(PICTURE), outputs=asked)),
        "gzip": found(
            client.infer(
                "fake",
                encoded(PICTURE),
                request_compression_algorithm="gzip",
                response_compression_algorithm="gzip",
            )
        ),
        "deflate": found(client.infer("fake", encoded(PICTURE), request_compression_algorithm="deflate")),
        "options": found(
            client.infer("fake", encoded(PICTURE), priority=1, timeout=9_000_000, parameters={"score_thresh": 0.5})
        ),
        "without_masks": found(client.infer("fake-boxes", encoded(PICTURE))),
        "errors": {
            "model": error_of(lambda: client.infer("x", encoded(PICTURE))),
            "image": error_of(lambda: client.infer("fake", encoded(PICTURE, b"no picture"))),
            "option": error_of(lambda: client.infer("fake", encoded(PICTURE), parameters={"score_tresh": 1})),
            "output": error_of(
                lambda: client.infer("fake", encoded(PICTURE), outputs=[triton.InferRequestedOutput("boxs")])
            ),
            "key": error_of(lambda: client.unload_model("fake-boxes")),
            "route": error_of(lambda: client.get_trace_settings()),
        },
        "index": client.get_model_repository_index(),
        "statistics": client.get_inference_statistics("fake"),
        "unloaded": client.unload_model("fake-boxes", headers=admin),
        "index_after": client.get_model_repository_index(),
        "loaded": client.load_model("fake-boxes", headers=admin),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
