"""Clients that send a byte a second, and hundreds that say nothing. `python -m tests.load.slow_clients`"""

from __future__ import annotations

import asyncio
import time

from service.load.summary import Summary
from tests.load._server import Server, serving
from tests.load._trial import Load, Verdict, detect_requests, mixed_pictures, outcomes, run_trial, tiny_store

CONCURRENCY = 4
BODY_TIMEOUT_SECONDS = 5.0
HEAD_TIMEOUT_SECONDS = 10.0  # the server's own, see docs/reliability.md
GRACE_SECONDS = 5.0


def slow_clients(*, idle: int = 500, slow: int = 50, rounds: int = 2, alone_seconds: float = 15.0) -> Verdict:
    """Good traffic is not harmed, and the slow are cut off.

    Args:
        slow: clients that send their head a byte a second, and as many that do so with their body.
        rounds: how often good traffic is measured, alone and, until the slow are cut off, beside them.
        alone_seconds: how long it is measured alone.
    """
    verdict = Verdict(f"{2 * slow} slow clients (1 byte/s) and {idle} idle connections")
    with tiny_store() as store, serving(store, body_timeout_seconds=BODY_TIMEOUT_SECONDS) as server:
        good = detect_requests(server, mixed_pictures())
        asyncio.run(Load(server, good).closed(concurrency=CONCURRENCY, seconds=alone_seconds / 10))  # warms up
        alone, beside = [], []
        cut_after: list[float] = []
        for _ in range(rounds):
            alone.append(asyncio.run(Load(server, good).closed(concurrency=CONCURRENCY, seconds=alone_seconds)))
            summary, seconds_each = asyncio.run(_with_the_others(server, good, idle=idle, slow=slow))
            beside.append(summary)
            cut_after += seconds_each
        ready = server.status("/readyz")
        timeouts = server.metrics().get('roiserve_requests_total{route="/v1/detect",status="408"}', 0.0)

    outcome = ", ".join(outcomes(one) for one in beside)
    verdict.note(f"good traffic: {outcome}")
    verdict.expect(all(set(one.outcomes) == {"200"} for one in beside), f"200 for good traffic, got {outcome}")
    rates = [sum(one.throughput_per_second for one in some) / rounds for some in (alone, beside)]
    verdict.note(f"{rates[0]:.1f}/s alone, {rates[1]:.1f}/s beside them")
    verdict.expect_speed(rates[1] >= 0.85 * rates[0], "at least 85 % of the throughput alone")
    verdict.expect(timeouts == rounds * slow, f"{rounds * slow} slow bodies counted as 408, got {timeouts:g}")
    limit = HEAD_TIMEOUT_SECONDS + GRACE_SECONDS
    verdict.note(f"the slow were cut off after {min(cut_after):.1f} – {max(cut_after):.1f} s")
    verdict.expect_speed(max(cut_after) <= limit, f"the slow cut off within {limit:g} s, got {max(cut_after):.1f} s")
    verdict.expect(ready == 200, f"a server that is ready afterwards, got {ready}")
    return verdict


async def _with_the_others(server: Server, good: list[bytes], *, idle: int, slow: int) -> tuple[Summary, list[float]]:
    """Good traffic beside the others, and after how many seconds each of the slow was cut off."""
    idlers = [await asyncio.open_connection(*server.target.address) for _ in range(idle)]
    head = b"POST /v1/detect HTTP/1.1\r\nHost: slow\r\nContent-Length: 1000\r\n\r\n"
    slow_ones = [_send_slowly(server, b"", head) for _ in range(slow)]
    slow_ones += [_send_slowly(server, head, bytes(1000)) for _ in range(slow)]
    summary, cut_after = await Load(server, good).during(asyncio.gather(*slow_ones), concurrency=CONCURRENCY)
    for _, writer in idlers:
        writer.close()
    return summary, cut_after


async def _send_slowly(server: Server, at_once: bytes, slowly: bytes) -> float:
    """Send some bytes at once and the others one a second; how many seconds until the server had enough of it."""
    begin = time.monotonic()
    reader, writer = await asyncio.open_connection(*server.target.address)
    writer.write(at_once)

    async def send() -> None:
        for index in range(len(slowly)):
            writer.write(slowly[index : index + 1])
            await asyncio.sleep(1.0)

    sending = asyncio.create_task(send())
    try:
        await reader.read()  # to the end of the connection
    except ConnectionError:
        pass
    finally:
        sending.cancel()
        writer.close()
    return time.monotonic() - begin


if __name__ == "__main__":
    run_trial(slow_clients)
