"""The promises of `RequestQueue`, on integers and a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from service.batching.backlog import SAFETY
from service.batching.queue import UNMEASURED_RETRY_AFTER_SECONDS, Entry, Priority, RequestQueue
from service.errors import NotReadyError, OverloadedError

INTERACTIVE, BULK = Priority.INTERACTIVE, Priority.BULK
PADDED = "c"
"""The group of the machine below whose entries have shapes."""


def make_queue(
    *,
    max_batch_size: int = 4,
    max_batch_cost: int = 100,
    max_queue_size: int = 100,
    max_queue_cost: int = 10_000,
    max_batch_wait_seconds: float = 0,
    bulk_share: float = 0.2,
) -> RequestQueue[str]:
    return RequestQueue(
        max_batch_size=max_batch_size,
        max_batch_cost=max_batch_cost,
        max_queue_size=max_queue_size,
        max_queue_cost=max_queue_cost,
        max_batch_wait_seconds=max_batch_wait_seconds,
        bulk_share=bulk_share,
    )


def admit(
    queue: RequestQueue[str],
    item: str,
    *,
    cost: int = 1,
    shape: tuple[int, ...] = (),
    at: float = 0,
    deadline: float | None = None,
    priority: Priority = INTERACTIVE,
) -> Entry[str]:
    """Admit an item whose group is its first letter: "a1" and "a2" may share a batch, "a1" and "b1" may not."""
    entry = Entry(
        item=item, group=item[0], cost=cost, shape=shape, enqueued_at=at, deadline=deadline, priority=priority
    )
    queue.admit(entry)
    return entry


def items(batch: Sequence[Entry[str]]) -> list[str]:
    return [entry.item for entry in batch]


class TestBatches:
    def test_empty_queue_has_no_batch(self) -> None:
        assert make_queue().take(now=0) == []

    def test_oldest_entrys_group_goes_first_and_mates_follow_in_order_of_age(self) -> None:
        queue = make_queue()
        for item in ["b1", "a1", "b2", "a2", "b3"]:
            admit(queue, item)
        assert [items(queue.take(now=0)) for _ in range(3)] == [["b1", "b2", "b3"], ["a1", "a2"], []]
        assert (len(queue), queue.cost) == (0, 0)

    def test_batch_ends_at_its_size(self) -> None:
        queue = make_queue(max_batch_size=2)
        for item in ["a1", "a2", "a3"]:
            admit(queue, item)
        assert [items(queue.take(now=0)) for _ in range(2)] == [["a1", "a2"], ["a3"]]

    def test_batch_ends_at_its_cost_and_nobody_is_overtaken_within_the_group(self) -> None:
        queue = make_queue(max_batch_cost=10)
        for item, cost in [("a1", 4), ("a2", 6), ("a3", 6), ("a4", 5), ("a5", 4)]:
            admit(queue, item, cost=cost)
        assert [items(queue.take(now=0)) for _ in range(3)] == [["a1", "a2"], ["a3"], ["a4", "a5"]]

    def test_oversize_item_goes_alone(self) -> None:
        queue = make_queue(max_batch_cost=10)
        for item, cost in [("a1", 1), ("a2", 11), ("a3", 1)]:
            admit(queue, item, cost=cost)
        assert [items(queue.take(now=0)) for _ in range(3)] == [["a1"], ["a2"], ["a3"]]

    def test_equal_items_are_different_entries(self) -> None:
        queue = make_queue()
        first, second = admit(queue, "a"), admit(queue, "a")
        assert queue.remove(first)
        assert queue.take(now=0) == [second]


class TestPadding:
    """Mates of other shapes are padded to the largest."""

    def test_mates_join_while_half_of_the_batch_is_theirs(self) -> None:
        queue = make_queue()
        admit(queue, "a1", cost=16, shape=(4, 4))
        admit(queue, "a2", cost=16, shape=(2, 8))  # 2 of (4, 8): 64, and 32 are theirs
        admit(queue, "a3", cost=1, shape=(1, 1))  # 3 of (4, 8): 96, of which 33 would be
        admit(queue, "a4", cost=32, shape=(4, 8))
        assert [items(queue.take(now=0)) for _ in range(2)] == [["a1", "a2", "a4"], ["a3"]]

    def test_batch_ends_at_the_cost_that_it_has_with_its_padding(self) -> None:
        queue = make_queue(max_batch_cost=63)
        admit(queue, "a1", cost=16, shape=(4, 4))
        admit(queue, "a2", cost=16, shape=(2, 8))
        assert [items(queue.take(now=0)) for _ in range(2)] == [["a1"], ["a2"]]

    def test_a_shape_that_is_not_the_cost_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"cost of the shape \(2, 3\), got 5"):
            admit(make_queue(), "a1", cost=5, shape=(2, 3))


class TestHolding:
    """With `max_batch_wait_seconds` a free device waits for mates, but never in vain."""

    def test_batch_is_held_until_the_oldest_has_waited_long_enough(self) -> None:
        queue = make_queue(max_batch_wait_seconds=5)
        admit(queue, "a1", at=10)
        admit(queue, "a2", at=14)
        assert queue.held_until == 15
        assert queue.take(now=14) == []
        assert items(queue.take(now=15)) == ["a1", "a2"]
        assert queue.held_until is None

    def test_full_batch_goes_at_once(self) -> None:
        queue = make_queue(max_batch_size=2, max_batch_wait_seconds=5)
        admit(queue, "a1")
        admit(queue, "b1")
        assert queue.take(now=0) == []
        admit(queue, "a2")
        assert items(queue.take(now=0)) == ["a1", "a2"]

    @pytest.mark.parametrize("costs", [[10], [11], [6, 5]])
    def test_batch_that_no_mate_could_join_goes_at_once(self, costs: list[int]) -> None:
        queue = make_queue(max_batch_cost=10, max_batch_wait_seconds=5)
        for number, cost in enumerate(costs):
            admit(queue, f"a{number}", cost=cost)
        assert items(queue.take(now=0)) == ["a0"]

    def test_batch_is_not_held_past_a_members_deadline(self) -> None:
        queue = make_queue(max_batch_wait_seconds=5)
        admit(queue, "a1", at=0)
        admit(queue, "a2", at=0, deadline=5)
        assert items(queue.take(now=0)) == ["a1", "a2"]

    def test_entry_whose_mates_are_on_their_way_is_held_while_all_of_its_batch_are(self) -> None:
        queue = make_queue()
        expecting = {"priority": BULK, "cost": 1, "enqueued_at": 0.0}
        queue.admit(Entry(item="a1", group="a", mates_until=5, **expecting))  # type: ignore[arg-type]  # of a kind each
        assert (queue.take(now=1), queue.held_until) == ([], 5)
        admit(queue, "b1")  # of the other priority, which does not wait
        assert items(queue.take(now=1)) == ["b1"]
        assert queue.take(now=1) == []
        admit(queue, "a2", at=2, priority=BULK)  # the last of them
        assert items(queue.take(now=2)) == ["a1", "a2"]

    def test_mates_are_not_waited_for_for_ever(self) -> None:
        queue = make_queue()
        queue.admit(Entry(item="a1", group="a", cost=1, enqueued_at=0, mates_until=5))
        assert queue.take(now=4) == []
        assert items(queue.take(now=5)) == ["a1"]

    def test_closed_queue_holds_nothing_back(self) -> None:
        queue = make_queue(max_batch_wait_seconds=5)
        admit(queue, "a1")
        queue.close()
        assert items(queue.take(now=0)) == ["a1"]


class TestAdmission:
    def test_full_queue_refuses_at_once_and_admits_again_when_there_is_room(self) -> None:
        queue = make_queue(max_queue_size=2, max_batch_size=1)
        admit(queue, "a1")
        admit(queue, "a2")
        with pytest.raises(OverloadedError, match="2 images wait, at most 2"):
            admit(queue, "a3")
        queue.take(now=0)
        admit(queue, "a4")
        assert len(queue) == 2

    def test_cost_that_waits_is_bounded(self) -> None:
        queue = make_queue(max_queue_cost=10)
        admit(queue, "a1", cost=6)
        with pytest.raises(OverloadedError, match="11 pixels would wait, at most 10"):
            admit(queue, "a2", cost=5)
        admit(queue, "a3", cost=4)
        assert queue.cost == 10

    def test_item_larger_than_the_whole_queue_is_admitted_to_an_empty_line_only(self) -> None:
        queue = make_queue(max_queue_cost=10)
        admit(queue, "a1", cost=11)
        with pytest.raises(OverloadedError):
            admit(queue, "a2", cost=1)

    def test_neither_priority_can_shut_the_other_out(self) -> None:
        queue = make_queue(max_queue_size=1)
        admit(queue, "a1", priority=BULK)
        admit(queue, "a2", priority=INTERACTIVE)
        for priority in Priority:
            with pytest.raises(OverloadedError, match="1 images wait, at most 1"):
                admit(queue, "a3", priority=priority)

    def test_closed_queue_refuses_and_still_gives_what_it_holds(self) -> None:
        queue = make_queue()
        admit(queue, "a1")
        queue.close()
        with pytest.raises(NotReadyError):
            admit(queue, "a2")
        assert items(queue.take(now=0)) == ["a1"]

    def test_expired_and_removed_entries_make_room(self) -> None:
        queue = make_queue(max_queue_size=2)
        early, late = admit(queue, "a1", deadline=3), admit(queue, "a2", deadline=4)
        assert queue.expire(now=3) == [early]
        assert (queue.remove(early), queue.remove(late)) == (False, True)
        assert (len(queue), queue.cost) == (0, 0)

    def test_cost_below_one_and_senseless_bounds_are_refused(self) -> None:
        with pytest.raises(ValueError, match="cost of at least 1"):
            admit(make_queue(), "a1", cost=0)
        with pytest.raises(ValueError, match="bounds of at least 1"):
            make_queue(max_queue_size=0)
        with pytest.raises(ValueError, match="bulk_share"):
            make_queue(bulk_share=1)


class TestDeadlines:
    """An entry that would not be done in time is refused instead of kept waiting for nothing."""

    @staticmethod
    def measured(**bounds: int) -> RequestQueue[str]:
        """A second a pixel."""
        queue = make_queue(**bounds)
        queue.measure(cost=10, seconds=10)
        return queue

    def test_what_waits_before_it_runs_counts(self) -> None:
        queue = self.measured(max_batch_size=1)
        admit(queue, "a1", cost=4)
        queue.take(now=0)
        admit(queue, "a2", cost=6)
        # At 1: 3 seconds of the batch that runs, 6 and 2 of what waits; of 20 seconds 12 are used at most.
        admit(queue, "a3", cost=2, at=1, deadline=21)
        with pytest.raises(
            OverloadedError, match=r"2 images .* would take 13.0 s, more than 60% of the 20.0 s until the"
        ):
            admit(queue, "a4", cost=2, at=1, deadline=21)

    def test_it_is_told_when_a_new_try_may_do_better(self) -> None:
        queue = self.measured()
        admit(queue, "a1", cost=20)
        with pytest.raises(OverloadedError) as refusal:
            admit(queue, "a2", cost=4, deadline=8)
        assert refusal.value.retry_after_seconds == pytest.approx(24 - SAFETY * 8)

    def test_free_device_tries_and_so_does_one_that_was_never_measured(self) -> None:
        admit(self.measured(), "a1", cost=100, deadline=1)
        queue = make_queue()
        for number in range(9):
            admit(queue, f"a{number}", cost=100, deadline=1)

    def test_device_that_was_expected_to_be_busy_but_is_free_tries(self) -> None:
        queue = self.measured()
        admit(queue, "a1", cost=1000)
        queue.take(now=0)
        assert queue.take(now=1) == []  # it was quicker than the rate said
        admit(queue, "a2", cost=1, at=1, deadline=2)

    def test_the_other_line_takes_its_share(self) -> None:
        queue = self.measured()
        admit(queue, "a1", cost=100, priority=BULK)
        admit(queue, "a2", cost=8)
        with pytest.raises(OverloadedError, match=r"20\.0 s"):  # of 16 pixels, and 4 of bulk
            admit(queue, "a3", cost=8, deadline=33)
        admit(queue, "a3", cost=8, deadline=34)
        with pytest.raises(OverloadedError, match=r"117\.0 s"):
            admit(queue, "a4", cost=1, deadline=155, priority=BULK)

    @settings(deadline=None, max_examples=60)
    @given(
        arrivals=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9), st.integers(1, 60)), max_size=60),
        max_batch_size=st.integers(1, 4),
    )
    def test_what_is_admitted_is_done_in_time(self, arrivals: list[tuple[int, int, int]], max_batch_size: int) -> None:
        """One group, a second a pixel: each arrival comes some seconds after the one before, with a cost and a
        deadline. Who is refused would have been late, or nearly.
        """
        queue = self.measured(max_batch_size=max_batch_size, max_batch_cost=10)
        now = device_free_at = 0
        for wait, cost, seconds_left in arrivals:
            now += wait
            while queue.cost and device_free_at <= now:
                device_free_at += self.run_batch(queue, device_free_at)
            device_free_at = max(device_free_at, now)
            needed = device_free_at - now + queue.cost + cost
            is_alone = device_free_at == now and len(queue) == 0
            try:
                admit(queue, "a", cost=cost, at=now, deadline=now + seconds_left)
            except OverloadedError:
                assert not is_alone
                assert needed > SAFETY * seconds_left
            else:
                assert is_alone or needed <= seconds_left
            if is_alone:
                device_free_at += self.run_batch(queue, now)
        while queue.cost:
            device_free_at += self.run_batch(queue, device_free_at)

    @staticmethod
    def run_batch(queue: RequestQueue[str], now: int) -> int:
        assert not queue.expire(now)
        return sum(entry.cost for entry in queue.take(now))


class TestRetryAfter:
    """A refused caller is told how long the device needs for all that is here now."""

    @staticmethod
    def retry_after_seconds(queue: RequestQueue[str]) -> float:
        with pytest.raises(OverloadedError) as refusal:
            admit(queue, "a9")
        return refusal.value.retry_after_seconds

    def test_before_any_measurement_it_is_a_constant(self) -> None:
        queue = make_queue(max_queue_size=1)
        admit(queue, "a1")
        assert self.retry_after_seconds(queue) == UNMEASURED_RETRY_AFTER_SECONDS

    def test_it_is_the_cost_that_waits_and_runs_over_the_measured_rate(self) -> None:
        queue = make_queue(max_queue_size=2, max_batch_size=1)
        queue.measure(cost=10, seconds=5)
        admit(queue, "a1", cost=4)
        queue.take(now=0)
        admit(queue, "a2", cost=6)
        admit(queue, "b1", cost=10, priority=BULK)
        admit(queue, "a3", cost=10)
        assert self.retry_after_seconds(queue) == pytest.approx((4 + 6 + 10 + 10) * 5 / 10)

    def test_it_follows_a_device_that_slows_down(self) -> None:
        queue = make_queue(max_queue_size=1)
        admit(queue, "a1", cost=10)
        for _ in range(100):
            queue.measure(cost=1, seconds=1)
        for _ in range(50):
            queue.measure(cost=1, seconds=3)
        assert self.retry_after_seconds(queue) == pytest.approx(30, rel=0.01)


class TestPriorities:
    def test_interactive_goes_before_older_bulk_and_they_never_share_a_batch(self) -> None:
        queue = make_queue()
        admit(queue, "a1", priority=BULK)
        admit(queue, "a2", priority=INTERACTIVE)
        assert [items(queue.take(now=0)) for _ in range(2)] == [["a2"], ["a1"]]

    def test_bulk_gets_its_share_by_cost(self) -> None:
        """A share of 1/5: after 4 pixels of interactive work, bulk is due 1."""
        queue = make_queue(max_batch_size=1, bulk_share=0.2)
        for number in range(12):
            admit(queue, f"a{number}", cost=2)
            admit(queue, f"b{number}", cost=1, priority=BULK)
        order = "".join(queue.take(now=0)[0].group for _ in range(12))  # type: ignore[misc]  # groups are letters here
        assert order == "abaabaabaaba"

    def test_bulk_pays_back_what_one_large_item_took(self) -> None:
        queue = make_queue(max_batch_size=1, bulk_share=0.5)
        for number in range(6):
            admit(queue, f"a{number}", cost=1)
        admit(queue, "b0", cost=4, priority=BULK)
        admit(queue, "b1", cost=4, priority=BULK)
        order = "".join(queue.take(now=0)[0].group for _ in range(8))  # type: ignore[misc]  # groups are letters here
        assert order == "abaaaaba"

    def test_share_that_nobody_wanted_is_not_saved_up(self) -> None:
        queue = make_queue(max_batch_size=1, bulk_share=0.5)
        for number in range(5):
            admit(queue, f"a{number}")
        for _ in range(3):
            queue.take(now=0)
        admit(queue, "b0", priority=BULK)
        assert items(queue.take(now=0)) == ["a3"]

    @settings(deadline=None)
    @given(
        costs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=20, max_size=60),
        max_batch_size=st.integers(1, 4),
        parts=st.integers(2, 10),
    )
    def test_while_both_wait_bulk_gets_its_share_to_within_one_batch(
        self, costs: list[tuple[int, int]], max_batch_size: int, parts: int
    ) -> None:
        queue = make_queue(max_batch_size=max_batch_size, max_batch_cost=12, bulk_share=1 / parts)
        for interactive_cost, bulk_cost in costs:
            admit(queue, "a", cost=interactive_cost)
            admit(queue, "a", cost=bulk_cost, priority=BULK)
        served = {INTERACTIVE: 0, BULK: 0}
        waiting = dict.fromkeys(Priority, len(costs))
        while all(waiting.values()):
            batch = queue.take(now=0)
            served[batch[0].priority] += sum(entry.cost for entry in batch)
            waiting[batch[0].priority] -= len(batch)
            due = served[INTERACTIVE] / (parts - 1)
            assert due - 12 / (parts - 1) - 1e-6 <= served[BULK] <= due + 12 + 1e-6


def test_at_ten_times_the_capacity_the_device_stays_busy_and_waiting_is_bounded() -> None:
    """One second a pixel; one-pixel items of two groups, ten a second, for 1000 seconds; eight may wait, four share."""
    queue = make_queue(max_batch_size=4, max_queue_size=8)
    waits: list[float] = []
    device_free_at = 0
    for tick in range(10_000):
        now = tick / 10
        with suppress(OverloadedError):
            admit(queue, "ab"[tick % 2], at=now)
        if now >= device_free_at:
            batch = queue.take(now)
            waits += [now - entry.enqueued_at for entry in batch]
            device_free_at = int(now) + len(batch)
    assert len(waits) >= 990
    assert max(waits) <= 8 + 4


class QueueMachine(RuleBasedStateMachine):
    """Any order of arrivals, cancellations, expiries, batches, shortages and shutdown, held against a plain list.

    The model: `waiting`, all entries accepted and not seen again, in order of arrival.
    """

    accepted: Bundle[Entry[str]] = Bundle("accepted")

    @initialize(
        max_batch_size=st.integers(1, 4),
        max_batch_cost=st.integers(1, 12),
        max_queue_size=st.integers(1, 8),
        max_queue_cost=st.integers(1, 30),
        max_batch_wait_seconds=st.sampled_from([0, 0, 3]),
    )
    def begin(
        self,
        max_batch_size: int,
        max_batch_cost: int,
        max_queue_size: int,
        max_queue_cost: int,
        max_batch_wait_seconds: int,
    ) -> None:
        self.max_batch_size, self.max_batch_cost = max_batch_size, max_batch_cost
        self.max_queue_size, self.max_queue_cost = max_queue_size, max_queue_cost
        self.max_batch_wait_seconds = max_batch_wait_seconds
        self.queue = make_queue(
            max_batch_size=max_batch_size,
            max_batch_cost=max_batch_cost,
            max_queue_size=max_queue_size,
            max_queue_cost=max_queue_cost,
            max_batch_wait_seconds=max_batch_wait_seconds,
        )
        self.now = 0
        self.is_closed = False
        self.waiting: list[Entry[str]] = []
        self.batches_left: dict[Entry[str], int] = {}  # of its line, until its own at the latest

    def line(self, priority: Priority) -> list[Entry[str]]:
        return [entry for entry in self.waiting if entry.priority is priority]

    @rule(
        target=accepted,
        group=st.sampled_from("abc"),
        height=st.integers(1, 4),
        width=st.integers(1, 4),
        priority=st.sampled_from(Priority),
        seconds_left=st.one_of(st.none(), st.integers(1, 5)),
    )
    def submit(self, group: str, height: int, width: int, priority: Priority, seconds_left: int | None) -> Entry[str]:
        cost = height * width
        deadline = None if seconds_left is None else self.now + seconds_left
        entry = Entry(
            item=group,
            group=group,
            cost=cost,
            shape=(height, width) if group == PADDED else (),
            enqueued_at=self.now,
            deadline=deadline,
            priority=priority,
        )
        line = self.line(priority)
        total_cost = sum(waiting.cost for waiting in line) + cost
        fits = len(line) < self.max_queue_size and (not line or total_cost <= self.max_queue_cost)
        try:
            self.queue.admit(entry)
        except NotReadyError:
            assert self.is_closed
        except OverloadedError:
            assert not fits
        else:
            assert fits and not self.is_closed
            self.waiting.append(entry)
            self.batches_left[entry] = len(line) + 1
        return entry

    @rule(entry=consumes(accepted))
    def cancel(self, entry: Entry[str]) -> None:
        was_waiting = entry in self.waiting
        assert self.queue.remove(entry) == was_waiting
        if was_waiting:
            self.waiting.remove(entry)

    @rule(seconds=st.integers(1, 4))
    def let_time_pass(self, seconds: int) -> None:
        self.now += seconds

    @rule(cost=st.integers(2, 12))
    def run_out_of_memory(self, cost: int) -> None:
        self.queue.lower_batch_cost(cost, self.now)
        assert 1 <= self.queue.max_batch_cost(self.now) <= max(1, cost // 2)

    @rule()
    def take_batch(self) -> None:
        self.expire()
        batch = self.queue.take(self.now)
        if batch:
            self.check_batch(batch)
        else:
            assert not self.waiting or self.is_held()

    def expire(self) -> None:
        expired = self.queue.expire(self.now)
        overdue = [entry for entry in self.waiting if entry.deadline is not None and entry.deadline <= self.now]
        assert set(expired) == set(overdue) and len(expired) == len(overdue)
        self.waiting = [entry for entry in self.waiting if entry not in overdue]

    def check_batch(self, batch: list[Entry[str]]) -> None:
        line = self.line(batch[0].priority)
        mates = [entry for entry in line if entry.group == line[0].group]
        assert batch == [entry for entry in mates if entry in batch]  # one line, one group, the oldest first
        total_cost = self.cost_together(batch)
        max_batch_cost = self.queue.max_batch_cost(self.now)
        assert len(batch) <= self.max_batch_size
        assert total_cost <= max_batch_cost <= self.max_batch_cost or len(batch) == 1
        assert total_cost <= 2 * sum(entry.cost for entry in batch)
        if batch[0].group != PADDED:
            assert batch == mates[: len(batch)]  # nobody overtaken
            if len(mates) > len(batch) < self.max_batch_size:  # no room was left that the next mate could have used
                assert total_cost + mates[len(batch)].cost > max_batch_cost
        for entry in line:
            self.batches_left[entry] -= 1
            assert self.batches_left[entry] > 0 or entry in batch  # nobody starves
        self.waiting = [entry for entry in self.waiting if entry not in batch]

    def cost_together(self, batch: list[Entry[str]]) -> int:
        if batch[0].group != PADDED:
            return sum(entry.cost for entry in batch)
        heights, widths = zip(*(entry.shape for entry in batch), strict=True)
        return len(batch) * int(max(heights)) * int(max(widths))

    def is_held(self) -> bool:
        """Whether some line's oldest entry is so young that it may be waiting for mates."""
        oldest = [line[0] for line in map(self.line, Priority) if line]
        earliest = self.now - self.max_batch_wait_seconds
        return not self.is_closed and any(entry.enqueued_at > earliest for entry in oldest)

    @precondition(lambda self: not self.is_closed)
    @rule()
    def close(self) -> None:
        self.queue.close()
        self.is_closed = True

    @invariant()
    def queue_and_model_agree_and_bounds_hold(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert self.queue.cost == sum(entry.cost for entry in self.waiting)
        for line in map(self.line, Priority):
            assert len(line) <= self.max_queue_size
            assert sum(entry.cost for entry in line) <= self.max_queue_cost or len(line) == 1

    def teardown(self) -> None:
        """Shutdown: a closed queue gives all it holds, batch after batch, and then nothing."""
        self.close()
        while self.waiting:
            before = len(self.waiting)
            self.take_batch()
            assert len(self.waiting) < before
        assert self.queue.take(self.now) == []


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(deadline=None)
