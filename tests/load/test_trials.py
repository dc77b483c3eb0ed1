"""The trials with small numbers: what they promise of every answer holds on any machine, however slow it is. What they
promise of speed is left to the real ones; see docs/reliability.md.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.load._trial import Verdict
from tests.load.costly import costly
from tests.load.hang_ups import hang_ups
from tests.load.header_death import header_death
from tests.load.hot_swap import hot_swap
from tests.load.out_of_memory import out_of_memory
from tests.load.overload import overload
from tests.load.poison import poison
from tests.load.priorities import priorities
from tests.load.sigterm import sigterm
from tests.load.slow_clients import slow_clients
from tests.load.worker_kills import worker_kills


@pytest.mark.parametrize(
    "trial",
    [
        pytest.param(lambda: overload(seconds=3.0, factor=5.0, min_size=200), id="overload"),
        pytest.param(lambda: costly(seconds=0.3, side=1000, objects=100, items=20_000), id="costly"),
        pytest.param(lambda: worker_kills(kills=2, pause_seconds=0.5), id="worker_kills"),
        pytest.param(lambda: poison(good=40), id="poison"),
        pytest.param(lambda: header_death(bad=2), id="header_death"),
        pytest.param(lambda: out_of_memory(seconds=1.0), id="out_of_memory"),
        pytest.param(lambda: sigterm(times=1, load_seconds=0.5), id="sigterm"),
        pytest.param(lambda: hang_ups(callers=60), id="hang_ups"),
        pytest.param(lambda: hot_swap(seconds=0.5), id="hot_swap"),
        pytest.param(lambda: slow_clients(idle=50, slow=5, rounds=1, alone_seconds=1.0), id="slow_clients"),
        pytest.param(lambda: priorities(seconds=2.0), id="priorities"),
    ],
)
def test_trial_breaks_no_promise(trial: Callable[[], Verdict]) -> None:
    verdict = trial()
    assert not verdict.broken, verdict.row()
