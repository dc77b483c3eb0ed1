"""How many replicas the autoscaler wants, on numbers that can be checked by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from service.cluster.scaling import QueuedPixels

POLICY = QueuedPixels(target_pixels=4e6, downscale_delay_seconds=60)


@pytest.mark.parametrize(
    ("waiting", "ongoing", "replicas", "wanted"),
    [
        (0, 0, 1, 1),
        (4e6, 5, 1, 1),  # just what it may be
        (5e6, 5, 1, 2),
        (40e6, 50, 2, 10),  # all at once, not one by one
        (8e6, 9, 2, 2),
        (1, 1, 3, 3),  # something waits, so none is superfluous
    ],
)
def test_replicas_follow_the_pixels_that_wait(waiting: float, ongoing: float, replicas: int, wanted: int) -> None:
    assert POLICY.wanted(waiting=waiting, ongoing=ongoing, replicas=replicas, now=0, idle_since=None)[0] == wanted


def test_superfluous_replicas_go_one_at_a_time_after_the_delay() -> None:
    replicas, idle_since, seen = 3, None, []
    for now in range(0, 200, 20):
        replicas, idle_since = POLICY.wanted(
            waiting=0, ongoing=0, replicas=replicas, now=float(now), idle_since=idle_since
        )
        seen.append(replicas)
    assert seen == [3, 3, 3, 2, 2, 2, 1, 1, 1, 1]


def test_a_pause_in_idleness_begins_the_delay_anew() -> None:
    _, idle_since = POLICY.wanted(waiting=0, ongoing=0, replicas=2, now=0, idle_since=None)
    _, idle_since = POLICY.wanted(waiting=1, ongoing=1, replicas=2, now=30, idle_since=idle_since)
    assert POLICY.wanted(waiting=0, ongoing=0, replicas=2, now=70, idle_since=idle_since)[0] == 2


def test_bounds_of_the_deployment_hold() -> None:
    context = SimpleNamespace(
        aggregated_metrics={"queue_pixels": {"a": 90e6, "b": 10e6}},
        total_num_requests=100,
        target_num_replicas=2,
        current_time=0.0,
        policy_state={},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
    )
    assert POLICY(context) == (8, {"idle_since": None})
