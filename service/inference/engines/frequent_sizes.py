"""Which sizes of pictures come so often that it is worth preparing for them."""

from __future__ import annotations

from collections import Counter

Size = tuple[int, int]

_ENOUGH = 8
"""Pictures of one size before it is chosen."""
_CLEARLY_MORE = 2
"""How many times as often a size must come as a chosen one to take its place, so that sizes that come about equally
often do not take turns.
"""
_MEMORY = 4096
"""All counts are halved after so many pictures, so that what comes now counts most."""


class FrequentSizes:
    """Counts pictures by size.

    Args:
        most: how many sizes are chosen at most.

    Attributes:
        chosen: the sizes to be prepared for.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._counts: Counter[Size] = Counter()
        self.chosen: set[Size] = set()

    def count(self, size: Size, pictures: int) -> None:
        """Count pictures of a size."""
        self._counts[size] += pictures
        if self._counts.total() > _MEMORY:
            self._counts = Counter({one: count // 2 for one, count in self._counts.items() if count > 1})

    def choose(self, size: Size) -> bool:
        """Choose a size if it comes often enough and is not chosen yet; another one may lose its place. Returns whether
        it was chosen.
        """
        if size in self.chosen or self._counts[size] < _ENOUGH:
            return False
        if len(self.chosen) == self._most:
            rarest = min(self.chosen, key=self._counts.__getitem__)
            if self._counts[size] < _CLEARLY_MORE * self._counts[rarest]:
                return False
            self.chosen.remove(rarest)
        self.chosen.add(size)
        return True
