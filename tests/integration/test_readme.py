"""The README's own example against the real thing: `roiserve serve` with the bundled models, asked over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from pycocotools import mask as coco_mask

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
EXAMPLE = re.search(
    r"curl -F image=@(?P<file>\S+) 'http://127\.0\.0\.1:8000(?P<path>/\S+)'\n```.*?```json\n(?P<answer>.*?)```",
    README,
    flags=re.DOTALL,
)


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "service", "serve", "--port", str(port)], cwd=REPOSITORY)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        try:
            _wait_until_ready(client, process)
            yield client
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
    assert status == 0


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)  # nothing tells when another process listens
    pytest.fail(f"the server ended with status {process.returncode}")


def post(server: httpx.Client, file: str, path: str = "/v1/detect") -> dict[str, Any]:
    response = server.post(path, files={"image": (REPOSITORY / file).read_bytes()})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def assert_alike(ours: Any, theirs: Any) -> None:
    """Equal, but for the last digits of floats, which differ between machines."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs.keys() - {"request_id", "timings_ms", "counts"}:
            assert_alike(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(one, other)
    else:
        assert ours == (pytest.approx(theirs, abs=2e-3) if isinstance(theirs, float) else theirs)


def test_the_request_in_the_readme_gets_the_answer_in_the_readme(server: httpx.Client) -> None:
    assert EXAMPLE is not None, "the README shows a curl command and its answer"
    expected = json.loads(EXAMPLE["answer"])
    answer = post(server, EXAMPLE["file"], EXAMPLE["path"])
    assert_alike(answer, expected)
    assert answer["timings_ms"].keys() == expected["timings_ms"].keys()
    for one, other in zip(answer["detections"], expected["detections"], strict=True):
        assert coco_mask.iou([one["mask"]], [other["mask"]], [0])[0][0] > 0.99


def test_every_mask_decodes_and_lies_about_in_its_box(server: httpx.Client) -> None:
    answer = post(server, "examples/nuclei-2.png")
    assert len(answer["detections"]) >= 20
    for detection in answer["detections"]:
        x, y, width, height = coco_mask.toBbox(detection["mask"])
        x1, y1, x2, y2 = detection["box"]
        # The mask head's 28 x 28 probabilities are spread over the box and half a cell of theirs around it.
        slack_x, slack_y = 1 + (x2 - x1) / 28, 1 + (y2 - y1) / 28
        assert coco_mask.area(detection["mask"]) > 0
        assert x1 - slack_x <= x
        assert y1 - slack_y <= y
        assert x + width <= x2 + slack_x
        assert y + height <= y2 + slack_y


def test_many_at_once_get_the_answers_they_get_alone(server: httpx.Client) -> None:
    files = [f"examples/{name}" for name in ("nuclei-1.png", "nuclei-2.png", "blood-smear-1.jpg", "blood-smear-2.jpg")]
    paths = ["/v1/detect?masks=none", "/v1/detect?model=blood-cells"]
    orders = [(file, paths["blood" in file]) for file in files]
    alone = [post(server, *order)["detections"] for order in orders]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda order: post(server, *order), orders * 4))
    assert max(answer["batch_size"] for answer in together) > 1
    for answer, expected in zip(together, alone * 4, strict=True):
        assert_alike(answer["detections"], expected)


@pytest.mark.parametrize("page", ["client/README.md", "docs/client.md"])
def test_the_clients_example_prints_what_its_page_says(server: httpx.Client, page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    example = example.replace("http://127.0.0.1:8000", str(server.base_url))
    run = subprocess.run(
        [sys.executable, "-c", example],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "client"), "NO_PROXY": "*"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in text
