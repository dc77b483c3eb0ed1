"""A new version of a model takes the old one's place under load. `python -m tests.load.hot_swap`"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import httpx

from service.load.client import Client, Reply
from tests.load._model import NAME, write_tiny_model
from tests.load._server import Server, serving
from tests.load._trial import Load, Verdict, detect_requests, mixed_pictures, outcomes, run_trial, tiny_store

CONCURRENCY = 8
KEY = "swap"


@dataclass(frozen=True)
class Answer:
    """The answer to one of the pictures."""

    request: bytes
    version: int
    detections: Any


def hot_swap(*, seconds: float = 6.0) -> Verdict:
    """No request fails; each is answered by the old version or by the new one, and by the new one once it is there.

    Args:
        seconds: of load before the new version is loaded, and after.
    """
    verdict = Verdict("hot swap under load")
    answers: list[Answer] = []

    def keep(request: bytes, reply: Reply) -> None:
        if reply.status == 200:
            document = json.loads(reply.body)
            answers.append(Answer(request, document["version"], document["detections"]))

    with tiny_store() as store, serving(store, admin_keys=KEY, api_keys="user") as server:
        write_tiny_model(store, version=2, seed=1)
        requests = detect_requests(server, mixed_pictures(16), headers={"X-API-Key": KEY})
        expected = {(request, 1): detections for request, detections in asyncio.run(_ask_all(server, requests))}
        load = Load(server, requests, on_reply=keep)
        summary, swapped_at = asyncio.run(load.during(_swap(server, seconds), concurrency=CONCURRENCY))
        expected |= {(request, 2): detections for request, detections in asyncio.run(_ask_all(server, requests))}
        models = [one["name"] + "@" + str(one["version"]) for one in _get_models(server)]
        ready = [series for series in server.metrics() if series.startswith("roiserve_model_ready")]

    verdict.note(outcomes(summary))
    verdict.expect(set(summary.outcomes) == {"200"}, f"200 for every request, got {outcomes(summary)}")
    versions = [answer.version for answer in answers]
    verdict.note(f"{versions.count(1)} answers by version 1, {versions.count(2)} by version 2")
    verdict.expect(set(versions) == {1, 2}, f"answers by both versions, got {set(versions)}")
    mixed = sum(answer.detections != expected[answer.request, answer.version] for answer in answers)
    verdict.expect(mixed == 0, f"every answer by one version alone, got {mixed} that neither gives")
    late = [
        answer.version
        for answer, sample in zip(answers, load.record.samples, strict=True)
        if sample.sent_at > swapped_at and answer.version != 2
    ]
    verdict.expect(not late, f"version 2 for all that were sent when it was there, got {len(late)} others")
    verdict.expect(models == [f"{NAME}@2"], f"version 2 alone in the list of models, got {models}")
    verdict.expect(ready == [f'roiserve_model_ready{{model="{NAME}@2"}}'], f"version 2 alone ready, got {ready}")
    return verdict


async def _ask_all(server: Server, requests: list[bytes]) -> list[tuple[bytes, Any]]:
    """What is found in each picture, asked one after the other."""
    async with Client(server.target) as client:
        replies = [await client.send(request) for request in requests]
    return [(request, json.loads(reply.body)["detections"]) for request, reply in zip(requests, replies, strict=True)]


async def _swap(server: Server, seconds: float) -> float:
    """When the new version was there, in seconds since now."""
    begin = time.monotonic()
    await asyncio.sleep(seconds)
    response = await asyncio.to_thread(_post, server, f"/v1/models/{NAME}@2/load")
    response.raise_for_status()
    swapped_at = time.monotonic() - begin
    await asyncio.sleep(seconds)
    return swapped_at


def _post(server: Server, path: str) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", headers={"X-API-Key": KEY}, timeout=120, trust_env=False)


def _get_models(server: Server) -> list[dict[str, Any]]:
    response = httpx.get(f"{server.url}/v1/models", headers={"X-API-Key": KEY}, timeout=30, trust_env=False)
    models: list[dict[str, Any]] = response.json()["models"]
    return models


if __name__ == "__main__":
    run_trial(hot_swap)
