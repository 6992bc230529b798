"""Calls from members whose record has not arrived yet, and how often one asks for the same record."""

from __future__ import annotations

from collections import Counter
from typing import Final, NamedTuple

from crossedge.meshd.client_events import Called

WAITING_MAX: Final = 32
WAITING_TIME: Final = 3.0  # seconds for which a call waits for its caller's record
FIND_INTERVAL: Final = 1.0  # seconds between questions for the same address or node
FINDS_MAX: Final = 256


class _Waiting(NamedTuple):
    event: Called
    until: float


class WaitingCalls:
    """Calls that wait, the oldest dropped first."""

    __slots__ = ("_calls", "_dropped")

    def __init__(self, dropped: Counter[str]) -> None:
        self._calls: list[_Waiting] = []
        self._dropped = dropped

    def add(self, event: Called, now: float) -> None:
        """Keep a call until its caller's record is there: it may have registered a moment ago."""
        if len(self._calls) >= WAITING_MAX:
            del self._calls[0]
            self._dropped["waiting-calls-full"] += 1
        self._calls.append(_Waiting(event, now + WAITING_TIME))

    def take(self, node_id: bytes, now: float) -> list[Called]:
        """Return the calls of a caller whose record has come, and forget them and those that are too old."""
        found = [call.event for call in self._calls if call.event.caller == node_id and now < call.until]
        self._calls = [call for call in self._calls if call.event.caller != node_id and now < call.until]
        return found


class Finds:
    """Lets the same question through once in a while."""

    __slots__ = ("_asked", "_dropped")

    def __init__(self, dropped: Counter[str]) -> None:
        self._asked: dict[bytes, float] = {}
        self._dropped = dropped

    def may_ask(self, subject: bytes, now: float) -> bool:
        """Tell whether to ask for this node id or address now."""
        if now - self._asked.get(subject, float("-inf")) < FIND_INTERVAL:
            return False
        if len(self._asked) >= FINDS_MAX:
            self._asked = {key: at for key, at in self._asked.items() if now - at < FIND_INTERVAL}
            if len(self._asked) >= FINDS_MAX:
                self._dropped["too-many-finds"] += 1
                return False
        self._asked[subject] = now
        return True
