"""The promises of `HeldBytes`, on integers and a clock that only the test moves."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching.held_bytes import HeldBytes, Holding
from service.errors import OverloadedError


class Clock:
    """Stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_bytes_beyond_the_bound_are_refused_and_not_counted() -> None:
    held_bytes = HeldBytes(10)
    with held_bytes.hold() as first, held_bytes.hold() as second:
        first.add(6)
        with pytest.raises(OverloadedError, match="would hold 11 bytes, at most 10"):
            second.add(5)
        second.add(4)
        assert held_bytes.size == 10


def test_what_was_held_is_given_back_also_after_an_error() -> None:
    held_bytes = HeldBytes(10)
    with suppress(ValueError), held_bytes.hold() as holding:
        holding.add(10)
        raise ValueError
    assert held_bytes.size == 0


def test_what_is_announced_takes_no_room() -> None:
    """A hundred callers who announce a large body and send nothing do not shut out the one who sends."""
    held_bytes = HeldBytes(10)
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(held_bytes.hold()).expect(10)
        stack.enter_context(held_bytes.hold()).add(10)
        with held_bytes.hold() as late, pytest.raises(OverloadedError):
            late.expect(1)


def test_who_holds_alone_is_never_refused() -> None:
    held_bytes = HeldBytes(10)
    with held_bytes.hold() as only:
        only.expect(25)
        only.add(15)
        only.add(10)
        with held_bytes.hold() as other, pytest.raises(OverloadedError):
            other.add(1)


def test_refused_callers_are_told_how_long_a_request_lately_took() -> None:
    clock = Clock()
    held_bytes = HeldBytes(10, clock=clock)
    for _ in range(500):
        with held_bytes.hold() as holding:
            holding.add(1)
            clock.now += 3
        with held_bytes.hold():
            clock.now += 100  # a request without a body says nothing of how long bytes are held
    with held_bytes.hold() as large, held_bytes.hold() as late:
        large.add(10)
        with pytest.raises(OverloadedError) as refusal:
            late.add(1)
    assert refusal.value.retry_after_seconds == pytest.approx(3, rel=0.01)


def test_a_bound_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        HeldBytes(0)


@settings(deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 4), st.one_of(st.integers(1, 8), st.none())), max_size=40))
def test_the_bound_holds_whatever_arrives_and_ends(steps: list[tuple[int, int | None]]) -> None:
    """Five requests: each step, one of them gets so many bytes more, or ends (None) and another takes its place."""
    held_bytes = HeldBytes(20)
    open_requests: dict[int, tuple[ExitStack, Holding]] = {}
    for number, size in steps:
        if number not in open_requests:
            stack = ExitStack()
            open_requests[number] = stack, stack.enter_context(held_bytes.hold())
        stack, holding = open_requests[number]
        if size is None:
            stack.close()
            del open_requests[number]
        else:
            with suppress(OverloadedError):
                holding.add(size)
        sizes = [holding.size for _, holding in open_requests.values() if holding.size > 0]
        assert held_bytes.size == sum(sizes)
        assert sum(sizes) <= 20 or len(sizes) == 1
    for stack, _ in open_requests.values():
        stack.close()
    assert held_bytes.size == 0
