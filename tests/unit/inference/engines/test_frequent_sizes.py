"""Sizes that come often are chosen, and sizes that come about equally often do not take turns."""

from __future__ import annotations

from service.inference.engines.frequent_sizes import FrequentSizes

WIDE, TALL, SQUARE = (512, 704), (704, 512), (512, 512)


def chosen_after(sizes: FrequentSizes, size: tuple[int, int], pictures: int) -> list[int]:
    """After which of so many pictures the size was chosen."""
    found = []
    for number in range(1, pictures + 1):
        sizes.count(size, 1)
        if sizes.choose(size):
            found.append(number)
    return found


def test_a_size_is_chosen_once_when_it_has_come_often() -> None:
    sizes = FrequentSizes(2)
    assert chosen_after(sizes, WIDE, 100) == [8]
    assert sizes.chosen == {WIDE}


def test_a_batch_counts_by_its_pictures() -> None:
    sizes = FrequentSizes(1)
    sizes.count(WIDE, 8)
    assert sizes.choose(WIDE)


def test_sizes_that_come_equally_often_do_not_take_turns() -> None:
    sizes = FrequentSizes(2)
    changes = 0
    for number in range(30_000):
        size = (WIDE, TALL, SQUARE)[number % 3]
        sizes.count(size, 1)
        changes += sizes.choose(size)
    assert changes == 2


def test_a_size_that_comes_far_more_often_takes_the_place_of_the_rarest() -> None:
    sizes = FrequentSizes(2)
    chosen_after(sizes, WIDE, 50)
    chosen_after(sizes, TALL, 20)
    assert chosen_after(sizes, SQUARE, 60) == [40]
    assert sizes.chosen == {WIDE, SQUARE}


def test_what_came_long_ago_counts_little() -> None:
    sizes = FrequentSizes(1)
    chosen_after(sizes, WIDE, 100_000)
    assert chosen_after(sizes, TALL, 10_000)
    assert sizes.chosen == {TALL}
