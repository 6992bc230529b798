"""When each of many is due: a heap that forgets lazily."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")

SLACK: Final = 64  # stale entries allowed beside 8 for each item


class Deadlines(Generic[Item]):
    """One deadline per item, each in seconds of the caller's `now`."""

    __slots__ = ("_due", "_heap", "_serial")

    def __init__(self) -> None:
        self._due: dict[Item, float] = {}
        self._heap: list[tuple[float, int, Item]] = []
        self._serial = 0

    def set(self, item: Item, when: float | None) -> None:
        """Replace an item's deadline; None: it has none."""
        if when is None:
            self._due.pop(item, None)
        elif self._due.get(item) != when:
            self._due[item] = when
            self._serial += 1
            heappush(self._heap, (when, self._serial, item))
            if len(self._heap) > SLACK + 8 * len(self._due):
                self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[0]]
                heapify(self._heap)

    def next(self) -> float | None:
        """Return the earliest deadline."""
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take(self, now: float) -> list[Item]:
        """Return the items that are due, earliest first, and forget their deadlines."""
        due: list[Item] = []
        while self._heap and self._heap[0][0] <= now:
            when, _, item = heappop(self._heap)
            if self._due.get(item) == when:
                del self._due[item]
                due.append(item)
        return due
