"""The bound on decoded pixels: nobody gets room that is not there, and nobody waits for ever."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from service.batching.held_pixels import HeldPixels
from service.errors import CancelledRequestError


def test_an_image_beyond_the_bound_is_taken_when_it_is_alone() -> None:
    held = HeldPixels(10)
    with held.hold() as holding:
        holding.take(11)
        assert held.size == 11
    assert held.size == 0


def test_room_that_is_given_back_goes_to_who_waits_for_it() -> None:
    held = HeldPixels(10)
    with ThreadPoolExecutor(1) as threads, ExitStack() as first, held.hold() as second:
        first.enter_context(held.hold()).take(8)
        taking = threads.submit(second.take, 3)
        while not held._turn.locked():
            pass
        assert (held.size, taking.done()) == (8, False)
        first.close()
        taking.result()
        assert held.size == 3


def test_who_waits_for_an_image_that_nobody_wants_any_more_is_told_so() -> None:
    held = HeldPixels(10)
    with ThreadPoolExecutor(1) as threads, ExitStack() as second, held.hold() as first:
        first.take(8)
        taking = threads.submit(second.enter_context(held.hold()).take, 3)
        while not held._turn.locked():
            pass
        second.close()
        with pytest.raises(CancelledRequestError):
            taking.result()
        assert held.size == 8
