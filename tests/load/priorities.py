"""People who wait, and folders of pictures that may take their time, at once. `python -m tests.load.priorities`"""

from __future__ import annotations

import asyncio
import json
from collections import Counter

from service.load.client import Reply
from service.load.summary import Summary
from tests.load._server import Server, serving
from tests.load._trial import Load, Verdict, added, detect_requests, mixed_pictures, outcomes, run_trial, tiny_store

MAX_BATCH_SIZE = 2
CALLERS = 8
BULK_CALLERS = 2
BULK_IMAGES = 16
# What the server promises to bulk of the device's time while others wait, less what a short trial may miss it by.
LEAST_BULK_SHARE = 0.15


def priorities(*, seconds: float = 30.0, min_size: int = 300) -> Verdict:
    """Bulk slows down those who wait by little, and is never forgotten.

    Args:
        seconds: each of alone and together.
        min_size: what pictures are resized to; large enough that the device is what all wait for.
    """
    verdict = Verdict(f"interactive ({CALLERS} callers) and bulk ({BULK_CALLERS} × {BULK_IMAGES} pictures) together")
    # Pictures of one size, so that every batch takes as long as the others.
    pictures = mixed_pictures(BULK_IMAGES, sides=(300, 300))
    with (
        tiny_store(min_size=min_size) as store,
        serving(store, max_batch_size=MAX_BATCH_SIZE, max_queue_size=128) as server,
    ):
        requests = detect_requests(server, pictures)
        asyncio.run(Load(server, requests).closed(concurrency=CALLERS, seconds=seconds / 10))  # warms up
        before = server.metrics()
        alone = asyncio.run(Load(server, requests).closed(concurrency=CALLERS, seconds=seconds))
        together, bulk, images = asyncio.run(_together(server, requests, pictures, seconds))
        after = server.metrics()

    p99s = [one.latency_ms["p99"] for one in (alone, together)]
    verdict.note(f"interactive: {outcomes(together)}, p99 {p99s[0]:.0f} ms alone, {p99s[1]:.0f} ms together")
    verdict.expect(set(together.outcomes) == {"200"}, f"200 for the interactive, got {outcomes(together)}")
    verdict.expect_speed(
        p99s[1] <= 1.5 * p99s[0], f"p99 at most 1.5 times that alone, got {p99s[1] / p99s[0]:.2f} times"
    )
    share = images["ok"] / (images["ok"] + together.requests)
    verdict.note(f"bulk: {outcomes(bulk)}, {images['ok']} pictures, {share:.0%} of all")
    verdict.expect(set(bulk.outcomes) == {"200"} and not images["error"], f"answers for all bulk, got {images}")
    answered = added(before, after, 'roiserve_images_total{model="tiny@1",outcome="ok"}')
    expected = alone.requests + together.requests + images["ok"]
    verdict.expect(answered == expected, f"{expected} pictures counted as ok, got {answered:g}")
    verdict.expect_speed(share >= LEAST_BULK_SHARE, f"bulk gets {LEAST_BULK_SHARE:.0%} of the device, got {share:.0%}")
    return verdict


async def _together(
    server: Server, requests: list[bytes], pictures: list[bytes], seconds: float
) -> tuple[Summary, Summary, Counter[str]]:
    """Interactive and bulk load at once, and how many pictures of bulk were answered (`ok`) or not (`error`)."""
    images: Counter[str] = Counter()

    def count(_: bytes, reply: Reply) -> None:
        if reply.status == 200:
            images.update("error" if "error" in one else "ok" for one in json.loads(reply.body)["results"])

    bulk = Load(server, [_batch_request(server, pictures)], on_reply=count)
    interactive = Load(server, requests)
    interactive_summary, bulk_summary = await asyncio.gather(
        interactive.closed(concurrency=CALLERS, seconds=seconds), bulk.closed(concurrency=BULK_CALLERS, seconds=seconds)
    )
    return interactive_summary, bulk_summary, images


def _batch_request(server: Server, pictures: list[bytes]) -> bytes:
    parts = [
        b'--edge\r\nContent-Disposition: form-data; name="image"; filename="%d"\r\n\r\n%b\r\n' % (index, picture)
        for index, picture in enumerate(pictures)
    ]
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    return server.target.request("POST", "/v1/detect/batch", headers=headers, body=b"".join(parts) + b"--edge--\r\n")


if __name__ == "__main__":
    run_trial(priorities)
