"""What is expensive, beside good traffic: legal requests that ask for much, and bombs. `python -m tests.load.costly`"""

from __future__ import annotations

import asyncio
import io
import json
import math
import struct
import zlib
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import PIL.Image

from service.load.client import Client, Target
from service.load.summary import Summary
from tests.load._server import Server, serving
from tests.load._trial import Load, Verdict, added, detect_requests, mixed_pictures, outcomes, run_trial, tiny_store

CALLERS = 2
SLOWER_AT_MOST = 2.0
TIMEOUT_SECONDS = 120.0


def costly(*, seconds: float = 24.0, side: int = 7000, objects: int = 1000, items: int = 1_000_000) -> Verdict:
    """None of them takes more from good traffic than a fair share of the processor, and none costs a worker.

    Args:
        seconds: at least, of good traffic beside each kind of costly request, which is sent again and again; as long
            alone, half of it just before and half just after, since the machine's speed changes.
        side: of the square picture whose masks are asked for.
        objects: how many.
        items: of the bombs in JSON.
    """
    verdict = Verdict("each costly request again and again, beside good traffic")
    # The sender is a process of its own: receiving large answers would delay the replies that are timed here.
    with (
        tiny_store(min_size=300) as store,
        serving(store) as server,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as sender,
    ):
        sender.submit(_import).result()
        good = detect_requests(server, mixed_pictures(sides=(300, 300)))
        asyncio.run(Load(server, good).closed(concurrency=CALLERS, seconds=seconds / 10))  # warms up
        before = server.metrics()
        for name, (request, allowed) in costly_requests(server, side=side, objects=objects, items=items).items():
            alone = Load(server, good)
            asyncio.run(alone.closed(concurrency=CALLERS, seconds=seconds / 2))
            beside, statuses = asyncio.run(_beside(server, good, request, seconds, sender=sender))
            alone_ms = asyncio.run(alone.closed(concurrency=CALLERS, seconds=seconds / 2)).latency_ms
            slower = beside.latency_ms["p99"] / alone_ms["p99"]
            answers = ", ".join(f"{count}×{status}" for status, count in sorted(statuses.items()))
            verdict.note(f"{name}: {answers}, good p99 {slower:.1f}×")
            verdict.expect(set(beside.outcomes) == {"200"}, f"{name}: 200 for all good, got {outcomes(beside)}")
            verdict.expect(set(statuses) <= allowed, f"{name}: one of {sorted(allowed)}, got {answers}")
            verdict.expect_speed(
                slower <= SLOWER_AT_MOST, f"{name}: good p99 at most {SLOWER_AT_MOST:g}× alone, got {slower:.1f}×"
            )
        restarts = added(before, server.metrics(), "roiserve_worker_restarts_total")
        verdict.expect(restarts == 0, f"no worker lost, got {restarts:g}")
    return verdict


async def _beside(
    server: Server, good: list[bytes], request: bytes, seconds: float, *, sender: Executor
) -> tuple[Summary, Counter[int]]:
    """Good traffic while one caller sends the costly request, and the statuses that it got."""
    sending = asyncio.get_running_loop().run_in_executor(sender, _send, server.target, request, seconds)
    return await Load(server, good).during(sending, concurrency=CALLERS)


def _import() -> None:
    """Does nothing: to call it, a new process imports this module."""


def _send(target: Target, request: bytes, seconds: float) -> Counter[int]:
    """Send a request again as soon as it is answered, and count the statuses."""

    async def send() -> Counter[int]:
        now = asyncio.get_running_loop().time
        end = now() + seconds
        statuses: Counter[int] = Counter()
        async with Client(target, timeout_seconds=TIMEOUT_SECONDS) as client:
            while not statuses or now() < end:
                statuses[(await client.send(request)).status] += 1
        return statuses

    return asyncio.run(send())


def costly_requests(server: Server, *, side: int, objects: int, items: int) -> Mapping[str, tuple[bytes, set[int]]]:
    """Each by its name, with the statuses that it may get: of what is legal 504 too, on a slow machine."""
    flat = _flat_picture(side)
    legal = {200, 422, 429, 504}

    def detect(body: bytes, kind: str, path: str = "/v1/detect") -> bytes:
        return server.target.request("POST", path, headers={"Content-Type": kind}, body=body)

    def asking(masks: str, boxes: list[list[float]]) -> bytes:
        document = {
            "image": b64encode(flat).decode(),
            "proposals": boxes,
            "masks": masks,
            "score_thresh": 0,
            "max_detections": 1000,
        }
        return detect(json.dumps(document).encode(), "application/json")

    large = [[0.0, 0.0, side, side]] * objects
    drawn = {"image": b64encode(flat).decode(), "proposals": large[:100], "score_thresh": 0, "max_detections": 100}
    numbers = ",".join(["1"] * items)
    keys = ",".join(f'"k{number}":1' for number in range(items // 10))
    disposition = b'Content-Disposition: form-data; name="x"; y="' + b'\\"' * 2000
    parts = (b"--edge\r\n" + disposition + b"\r\n\r\n\r\n") * (items // 5000)
    return {
        "small masks as png": (asking("png", _grid(side, objects)), legal),
        "large masks as png": (asking("png", large), legal),
        "large masks as crop": (asking("crop", large), legal),
        "large masks as polygons": (asking("polygons", large), legal),
        "large masks as rle": (asking("rle", large), legal),
        "drawn": (detect(json.dumps(drawn).encode(), "application/json", "/v1/annotate"), legal),
        "flat picture": (detect(flat, "image/png"), legal),
        "tiles beyond the picture": (detect(_tile_bomb(), "image/tiff"), {413, 415, 422}),
        "labels that are none": (
            detect(f'{{"image":"","labels":[{numbers}]}}'.encode(), "application/json"),
            {413, 422},
        ),
        "unknown keys": (detect(f'{{"image":"",{keys}}}'.encode(), "application/json"), {413, 422}),
        "unclosed quotes in a form": (detect(parts + b"--edge--", "multipart/form-data; boundary=edge"), {413, 422}),
    }


def _grid(side: int, objects: int) -> list[list[float]]:
    """Boxes side by side."""
    across = math.ceil(math.sqrt(objects))
    step = side / across
    corners = [(step * (number % across), step * (number // across)) for number in range(objects)]
    return [[x + 1, y + 1, x + step - 1, y + step - 1] for x, y in corners]


def _flat_picture(side: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("L", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def _tile_bomb() -> bytes:
    """A TIFF of 32768 x 164 pixels in tiles of 16 x 1048576, all of them the same deflated zeros."""
    width, height, tile_width, tile_height = 32768, 164, 16, 1 << 20
    data = zlib.compress(bytes(tile_width * tile_height), 9)
    count = width // tile_width
    tags = {
        256: [width],
        257: [height],
        258: [8],
        259: [8],
        262: [1],
        277: [1],
        322: [tile_width],
        323: [tile_height],
        324: [8] * count,
        325: [len(data)] * count,
    }
    blob, entries = struct.pack("<2sHI", b"II", 42, 0) + data, []
    for tag, values in tags.items():
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            blob += bytes(len(blob) % 2)
            packed, blob = struct.pack("<I", len(blob)), blob + packed
        entries.append(struct.pack("<HHI", tag, 4, len(values)) + packed)
    blob += bytes(len(blob) % 2)
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return blob[:4] + struct.pack("<I", len(blob)) + blob[8:] + directory


if __name__ == "__main__":
    run_trial(costly)
