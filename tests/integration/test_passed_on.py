"""The process that serves HTTP passes on what was encoded elsewhere: it neither parses it nor turns it into text."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from service.structures import Answer, Job
from tests.fakes import picture
from tests.integration.conftest import Live

PICTURE = picture()
BASE64 = base64.b64encode(PICTURE).decode()
# No JSON at all, so that whoever parsed it would fail.
PIECES = [b"[\xff", b"}" * 100_000, b"]"]
LABELS = '<BrushLabels name="b" toName="img"><Label value="cat"/></BrushLabels>'
CONFIG = f'<View><Image name="img" value="$photo"/>{LABELS}</View>'
TASK = {"data": {"photo": f"data:image/png;base64,{BASE64}"}}
RAW: dict[str, Any] = {"content": PICTURE}


@pytest.mark.parametrize(
    ("path", "options", "times"),
    [
        ("/v1/detect", RAW, 1),
        ("/v1/detect?format=coco&image_id=7", RAW, 1),
        ("/v1/detect/batch", {"files": [("image", PICTURE)] * 2}, 2),
        ("/v1/models/fake:predict", {"json": {"instances": [BASE64] * 2}}, 2),
        ("/invocations", RAW, 1),
        ("/roboflow/infer/instance_segmentation", {"json": {"model_id": "fake", "image": {"value": BASE64}}}, 1),
        ("/roboflow/fake/1", RAW, 1),
        ("/hf/fake/image-segmentation", RAW, 1),
        ("/hf/fake/object-detection", RAW, 1),
        (
            "/api/function_invocations",
            {"json": {"image": BASE64}, "headers": {"x-nuclio-function-name": "fake"}},
            1,
        ),
        ("/label-studio/fake/predict", {"json": {"label_config": CONFIG, "tasks": [TASK] * 2}}, 2),
    ],
)
def test_detections_go_through_as_they_are(
    live: Live, monkeypatch: pytest.MonkeyPatch, path: str, options: dict[str, Any], times: int
) -> None:
    async def run(job: Job) -> Answer:
        job.progress.stage_seconds |= dict.fromkeys(("decode", "queue", "inference", "encode"), 0.0)
        return Answer((48, 64), False, 1, 1, PIECES)

    monkeypatch.setattr(live.state.admission, "run", run)
    response = live.client.post(path, **options)
    assert response.status_code == 200
    assert response.content.count(b"".join(PIECES)) == times
