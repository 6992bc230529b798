"""What the core has to tell its shell, in order and bounded."""

from __future__ import annotations

from collections import Counter, deque
from typing import Final

from crossedge.meshd.events import MeshEvent, RoutesChanged, StateToPersist

EVENTS_MAX: Final = 8192


class EventQueue:
    """Events that wait for the shell; one that only says that something is another one now waits once."""

    __slots__ = ("_dropped", "_events", "_waiting")

    def __init__(self, dropped: Counter[str]) -> None:
        """Start empty; `dropped` counts what finds no room."""
        self._dropped = dropped
        self._events: deque[MeshEvent] = deque()
        self._waiting: set[type] = set()

    def __bool__(self) -> bool:
        """Tell whether anything waits."""
        return bool(self._events)

    def put(self, event: MeshEvent) -> None:
        """Queue an event."""
        if len(self._events) >= EVENTS_MAX:
            self._dropped["event-queue"] += 1
            return
        if isinstance(event, RoutesChanged | StateToPersist):
            if type(event) in self._waiting:
                return
            self._waiting.add(type(event))
        self._events.append(event)

    def poll(self) -> MeshEvent | None:
        """Return the next event, or None."""
        if not self._events:
            return None
        event = self._events.popleft()
        self._waiting.discard(type(event))
        return event
