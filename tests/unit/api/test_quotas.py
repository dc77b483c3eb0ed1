from __future__ import annotations

import pytest

from service.api.quotas import Quotas, fingerprint
from service.errors import QuotaError
from service.settings import Settings


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_key_may_send_its_share_at_once_and_then_as_it_flows_in(clock: Clock) -> None:
    quotas = Quotas(Settings(max_images_per_minute=6), clock)
    for _ in range(6):
        quotas.require("a")
        quotas.charge("a", images=1)
    with pytest.raises(QuotaError, match="6 images a minute") as refused:
        quotas.require("a")
    assert refused.value.retry_after_seconds == pytest.approx(10)
    clock.now += 10
    quotas.require("a")


def test_what_was_taken_beyond_the_share_is_waited_for(clock: Clock) -> None:
    """Pixels are known when the picture has been decoded; a large one may begin, and its key waits afterwards."""
    quotas = Quotas(Settings(max_pixels_per_minute=1e6), clock)
    quotas.require("a")
    quotas.charge("a", pixels=3_000_000)
    with pytest.raises(QuotaError) as refused:
        quotas.require("a")
    assert refused.value.retry_after_seconds == pytest.approx(120, abs=1e-3)
    clock.now += 121
    quotas.require("a")


def test_one_key_does_not_pay_for_another(clock: Clock) -> None:
    quotas = Quotas(Settings(max_images_per_minute=1), clock)
    quotas.charge("a", images=10)
    quotas.require("b")


def test_without_limits_or_without_a_key_nothing_is_counted(clock: Clock) -> None:
    Quotas(Settings(), clock).charge("a", images=10**9)
    quotas = Quotas(Settings(max_images_per_minute=1), clock)
    quotas.charge(None, images=10)
    quotas.require(None)


def test_a_pause_saves_up_one_minute_and_no_more(clock: Clock) -> None:
    quotas = Quotas(Settings(max_images_per_minute=2), clock)
    quotas.charge("a", images=2)
    clock.now += 3600
    quotas.charge("a", images=2)
    with pytest.raises(QuotaError):
        quotas.require("a")


def test_a_fingerprint_does_not_give_the_key_away() -> None:
    assert fingerprint(b"secret") == fingerprint(b"secret") != fingerprint(b"secret2")
    assert len(fingerprint(b"secret")) == 8
