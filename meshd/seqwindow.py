"""Which sequence numbers of one sender were accepted: for control messages between nodes.

Numbers grow but are far apart (microseconds), and datagrams may overtake each other. So the last few are
remembered one by one, and whatever is not above the smallest of them when the memory is full is refused.
"""

from __future__ import annotations

from heapq import heappush, heappushpop
from typing import Final

REMEMBERED: Final = 64
OLDEST: Final = 60_000_000  # microseconds behind the newest that a number may be


class SequenceWindow:
    """The numbers of one sender under one pair of control keys."""

    __slots__ = ("_floor", "_heap", "_newest", "_seen")

    def __init__(self) -> None:
        self._floor = 0
        self._newest = 0
        self._heap: list[int] = []
        self._seen: set[int] = set()

    def accept(self, seq: int) -> bool:
        """Mark a number as seen, after its message was opened; False where it was or may have been before."""
        if seq <= self._floor or seq in self._seen or seq < self._newest - OLDEST:
            return False
        self._newest = max(self._newest, seq)
        self._seen.add(seq)
        if len(self._heap) < REMEMBERED:
            heappush(self._heap, seq)
        else:
            self._floor = heappushpop(self._heap, seq)
            self._seen.discard(self._floor)
        return True
