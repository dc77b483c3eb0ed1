"""Standard error is the log and nothing else, whatever decoders have to say."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import numpy as np

ROOT = Path(__file__).parent.parent.parent
LONG = 4


def fax_of_noise() -> bytes:
    """A TIFF of 160 x 2000 pixels; libtiff has a line to write for nearly every row."""
    noise = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    values = {256: 160, 257: 2000, 258: 1, 259: 3, 262: 0, 273: 8, 277: 1, 278: 2000, 279: len(noise)}
    entries = b"".join(struct.pack("<HHII", tag, LONG, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<I", 8 + len(noise)) + noise + struct.pack("<H", len(values)) + entries + bytes(4)


def test_every_line_on_standard_error_is_json() -> None:
    settings = {"ROISERVE_PORT": "0", "ROISERVE_DEVICE": "cpu", "ROISERVE_LOG_FORMAT": "json"}
    lines: list[str] = []
    url_known = threading.Event()

    def read(process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "running on http" in line:
                url_known.set()

    with subprocess.Popen(
        [sys.executable, "-m", "tests.integration.serve_workers"],
        cwd=ROOT,
        env={**os.environ, **settings, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        reader = threading.Thread(target=read, args=(process,))
        reader.start()
        try:
            assert url_known.wait(120)
            [url] = {match[1] for line in lines if (match := re.search(r"running on (http://[\w.:]+)", line))}
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
                while client.get("/readyz").status_code != 200:
                    pass
                headers = {"Content-Type": "image/tiff"}
                answers = [client.post("/v1/detect", content=fax_of_noise(), headers=headers) for _ in range(3)]
        finally:
            process.kill()
            reader.join()
    assert {answer.status_code for answer in answers} <= {200, 422}
    assert len(lines) < 100
    assert all(isinstance(json.loads(line), dict) for line in lines)
