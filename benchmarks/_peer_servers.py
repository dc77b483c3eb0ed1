"""The same model behind four other servers, each written as its own documentation shows it: torchvision's `forward`,
masks pasted into the picture, `pycocotools`, `json`. `benchmarks.peers` starts them, in an environment of their own:

    MODEL=nuclei@1 PORT=8001 MAX_BATCH_SIZE=8 MAX_WAIT_MS=10 python -m benchmarks._peer_servers mosec

All take the bytes of a picture as the body of a POST, LitServe in base64 within JSON, and answer `{"detections": […]}`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from benchmarks._peer_answers import as_json, service


def run_fastapi(port: int) -> None:
    """One process; a route that is no coroutine runs in a thread, as FastAPI wants it for work that blocks."""
    import uvicorn
    from fastapi import Body, FastAPI

    app = FastAPI()
    service()

    @app.post("/detect")
    def detect(picture: bytes = Body(media_type="image/jpeg")) -> Response:
        return as_json(service().answer([picture])[0])

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def run_litserve(port: int, max_batch_size: int, max_wait_ms: int) -> None:
    import litserve

    from benchmarks._litserve_api import DetectAPI

    api = DetectAPI(max_batch_size=max_batch_size, batch_timeout=max_wait_ms / 1000, api_path="/detect")
    server = litserve.LitServer(api, accelerator="cpu", timeout=300)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)


def run_mosec(port: int, max_batch_size: int, max_wait_ms: int) -> None:
    from mosec import Server

    from benchmarks._mosec_worker import DetectWorker

    # mosec reads its configuration from the command line.
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(port), "--timeout", "300000", "--log-level", "warning"]
    server = Server()
    server.append_worker(DetectWorker, max_batch_size=max_batch_size, max_wait_time=max_wait_ms, route="/detect")
    server.run()


def run_ray(port: int, max_batch_size: int, max_wait_ms: int) -> None:
    import ray
    from ray import serve

    cores = os.cpu_count() or 1

    # A batch may wait while another is computed; Ray's default of 5 would keep it from ever being full.
    @serve.deployment(ray_actor_options={"num_cpus": cores}, max_ongoing_requests=3 * max_batch_size)
    class Detector:
        def __init__(self) -> None:
            service()

        @serve.batch(max_batch_size=max_batch_size, batch_wait_timeout_s=max_wait_ms / 1000)
        async def answer(self, pictures: Sequence[bytes]) -> list[bytes]:
            return service().answer(pictures)

        async def __call__(self, request: Request) -> Response:
            answer: Any = self.answer
            return as_json(await answer(await request.body()))

    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deployment: Any = Detector  # the decorator's types hide that it is a deployment now
        serve.run(deployment.bind(), route_prefix="/detect")
        threading.Event().wait()
    finally:
        serve.shutdown()
        ray.shutdown()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    port = int(os.environ["PORT"])
    batching = int(os.environ["MAX_BATCH_SIZE"]), int(os.environ["MAX_WAIT_MS"])
    if sys.argv[1] == "fastapi":
        run_fastapi(port)
    else:
        {"litserve": run_litserve, "mosec": run_mosec, "ray": run_ray}[sys.argv[1]](port, *batching)


if __name__ == "__main__":
    main()
