"""Half of the callers hang up while their requests wait. `python -m tests.load.hang_ups`"""

from __future__ import annotations

import asyncio

from service.load.client import Client
from tests.load._server import Server, serving
from tests.load._trial import Verdict, added, detect_requests, mixed_pictures, run_trial, tiny_store

MAX_BATCH_SIZE = 4


def hang_ups(*, callers: int = 200, min_size: int = 400) -> Verdict:
    """What nobody waits for any more is not computed, and the counters say where it was dropped.

    Args:
        callers: all call at once; every second one hangs up when half of them wait for the device.
        min_size: what pictures are resized to; large enough that many of them wait.
    """
    verdict = Verdict(f"half of {callers} callers hang up")
    with (
        tiny_store(min_size=min_size) as store,
        serving(store, max_queue_size=callers, max_batch_size=MAX_BATCH_SIZE) as server,
    ):
        requests = detect_requests(server, mixed_pictures(callers))
        before = dict(server.metrics())

        async def call(client: Client, request: bytes) -> int | None:
            try:
                return (await client.send(request)).status
            except asyncio.CancelledError:
                return None  # hung up

        async def call_all() -> list[int | None]:
            async with Client(server.target, timeout_seconds=300) as client:
                for request in requests[:MAX_BATCH_SIZE]:  # the server learns how fast it is, and lets all others in
                    await client.send(request)
                before.update(server.metrics())
                calls = [asyncio.create_task(call(client, request)) for request in requests]
                while await asyncio.to_thread(_waiting, server) < callers / 2 and not all(one.done() for one in calls):
                    await asyncio.sleep(0.01)
                for impatient in calls[1::2]:
                    impatient.cancel()
                return await asyncio.gather(*calls)

        statuses = asyncio.run(call_all())
        after = server.metrics()

    answered, gone = statuses.count(200), statuses.count(None)
    stages = {
        series.partition('stage="')[2].rstrip('"}'): value - before.get(series, 0.0)
        for series, value in after.items()
        if series.startswith("roiserve_cancelled_total")
    }
    where = ", ".join(f"{count:g} in {stage}" for stage, count in stages.items() if count)
    verdict.note(f"{answered} answered, {gone} hung up: {where}")
    verdict.expect(answered + gone == callers, f"200 for all who stay, got {set(statuses)}")
    verdict.expect(gone > callers / 4, f"many hang up, got {gone}")
    # A caller may go while the server reads its request: then there is no picture yet to be counted.
    counted = sum(stages.values())
    verdict.expect(0.9 * gone <= counted <= gone, f"{gone} counted as cancelled, got {counted:g}")
    computed = added(before, after, "roiserve_batch_size_sum")
    verdict.note(f"{computed:g} pictures computed")
    # Those who hang up while the device works on their picture are too late; so may be another batch, on its way.
    verdict.expect(
        answered <= computed <= answered + stages.get("inference", 0.0) + 2 * MAX_BATCH_SIZE,
        f"only the {answered} computed that were answered, and those under way; got {computed:g}",
    )
    ok = added(before, after, 'roiserve_images_total{model="tiny@1",outcome="ok"}')
    # Who hangs up when the answer is on its way gets it all the same, and never reads it.
    verdict.expect(
        answered <= ok <= answered + gone - counted,
        f"{answered} counted as ok, and at most {gone - counted:g} whose hanging up came too late; got {ok:g}",
    )
    return verdict


def _waiting(server: Server) -> float:
    return server.metrics()['roiserve_queue_depth{model="tiny@1"}']


if __name__ == "__main__":
    run_trial(hang_ups)
