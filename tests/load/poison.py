"""A picture that kills the worker, among good ones. `python -m tests.load.poison`"""

from __future__ import annotations

import asyncio

from service.load.client import Client
from tests.load._faults import killer_picture
from tests.load._server import serving
from tests.load._trial import PATIENT_SECONDS, Verdict, added, detect_requests, mixed_pictures, run_trial, tiny_store

CONCURRENCY = 8


def poison(*, good: int = 200) -> Verdict:
    """Whoever sent it is told so; nobody else is harmed."""
    verdict = Verdict(f"1 poisonous picture among {good} good ones")
    with tiny_store() as store, serving(store, fault="kill", request_timeout_ms=int(1000 * PATIENT_SECONDS)) as server:
        before = server.metrics()
        pictures = mixed_pictures(good)
        pictures.insert(good // 2, killer_picture())
        requests = detect_requests(server, pictures)

        async def send_all() -> list[int]:
            places = asyncio.Semaphore(CONCURRENCY)
            async with Client(server.target, timeout_seconds=PATIENT_SECONDS) as client:

                async def send(request: bytes) -> int:
                    async with places:
                        return (await client.send(request)).status

                return await asyncio.gather(*map(send, requests))

        statuses = asyncio.run(send_all())
        after = server.metrics()

    guilty = statuses.pop(good // 2)
    verdict.note(f"{statuses.count(200)}×200 for the good ones, {guilty} for the poisonous one")
    verdict.expect(statuses == [200] * good, f"200 for all good ones, got also {set(statuses) - {200}}")
    verdict.expect(guilty == 422, f"422 for the poisonous one, got {guilty}")
    restarts = added(before, after, "roiserve_worker_restarts_total")
    verdict.note(f"{restarts:g} workers lost")
    # Two while it was alone, which convicts it, and one before if it had mates on the device.
    verdict.expect(restarts in (2, 3), f"two or three workers lost, got {restarts:g}")
    answered = added(before, after, 'roiserve_images_total{model="tiny@1",outcome="ok"}')
    verdict.expect(answered == good, f"{good} pictures counted as ok, got {answered:g}")
    return verdict


if __name__ == "__main__":
    run_trial(poison)
