"""Many deadlines that are mostly put off: a heap whose stale entries are looked at only when they come up."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Deadlines(Generic[Key]):
    """Holds one entry per key; the true deadline stays with its owner and may only move later.

    Putting a deadline off costs nothing: the entry is asked for its true deadline when its old one passes.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Key]] = []
        self._entries: dict[Key, int] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, key: Key, deadline: float) -> None:
        """Watch a key, or watch it from an earlier time on than so far."""
        self._serial += 1
        self._entries[key] = self._serial
        heappush(self._heap, (deadline, self._serial, key))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [entry for entry in self._heap if self._entries.get(entry[2]) == entry[1]]
            heapify(self._heap)

    def discard(self, key: Key) -> None:
        """Forget a key."""
        self._entries.pop(key, None)

    def next(self) -> float | None:
        """Return the earliest time at which something may be due."""
        while self._heap and self._entries.get(self._heap[0][2]) != self._heap[0][1]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float, deadline: Callable[[Key], float]) -> Iterator[Key]:
        """Yield, and forget, each key whose true deadline has passed; `deadline(key)` tells it."""
        while (first := self.next()) is not None and first <= now:
            key = heappop(self._heap)[2]
            true = deadline(key)
            if true <= now:
                del self._entries[key]
                yield key
            else:
                self._serial += 1
                self._entries[key] = self._serial
                heappush(self._heap, (true, self._serial, key))
