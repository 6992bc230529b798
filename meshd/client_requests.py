"""Requests to a rendezvous that wait for their answer: ids, retries, round trip time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from crossedge.wire.messages import Message

MAX_REQUESTS: Final = 256
KEPT_MACS: Final = 4  # sends of one request whose cookie reply is still taken
MAX_CHALLENGES: Final = 3  # cookie replies to one request that are answered at once
RTO_FIRST: Final = 0.5  # seconds until a retry while no round trip was measured
RTO_MIN: Final = 0.1
RTO_MAX: Final = 1.0

Make = Callable[[int, float], Message]
"""Makes the message for each send, given the request's id and the time: sequence numbers are always fresh."""


@dataclass(slots=True)
class Request:
    """One question, however often it is sent."""

    id: int
    question: type[Message]
    make: Make
    answer: type[Message]
    tries: int
    """How often it is sent at most; 0 is without end."""
    interval: Callable[[int], float]
    """Seconds to wait after so many sends."""
    context: Any = None
    sent: int = 0
    sent_at: float = 0.0
    due: float = 0.0
    challenges: int = 0
    macs: list[tuple[bytes, float]] = field(default_factory=list)

    def remember(self, mac1: bytes, now: float) -> None:
        """Take note that it was sent, under this mac1; it is due again after its interval."""
        self.sent += 1
        self.sent_at = now
        self.macs = [*self.macs[1 - KEPT_MACS :], (mac1, now)]
        self.due = now + self.interval(self.sent)


class RoundTrip:
    """Estimates the round trip as TCP does (RFC 6298, section 2), from answers to single sends only."""

    __slots__ = ("deviation", "smoothed")

    def __init__(self) -> None:
        self.smoothed: float | None = None
        self.deviation = 0.0

    def sample(self, rtt: float) -> None:
        """Take one round trip, in seconds."""
        if self.smoothed is None:
            self.smoothed, self.deviation = rtt, rtt / 2
        else:
            self.deviation += (abs(rtt - self.smoothed) - self.deviation) / 4
            self.smoothed += (rtt - self.smoothed) / 8

    def timeout(self, sent: int = 1) -> float:
        """Return how many seconds to wait after so many sends: twice as long after each."""
        usual = RTO_FIRST
        if self.smoothed is not None:
            usual = max(RTO_MIN, self.smoothed + 4 * self.deviation)
        return max(usual, min(usual * 2.0 ** (sent - 1), RTO_MAX))


class Requests:
    """The table of what is outstanding, bounded."""

    def __init__(self, first_id: int) -> None:
        self._next = first_id & 0xFFFFFFFF
        self._table: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._table)

    def add(
        self,
        question: type[Message],
        make: Make,
        answer: type[Message],
        tries: int,
        interval: Callable[[int], float],
        context: Any = None,
    ) -> Request | None:
        """Return a new request, not sent yet; None if the table is full."""
        if len(self._table) >= MAX_REQUESTS:
            return None
        while not self._next or self._next in self._table:
            self._next = (self._next + 1) & 0xFFFFFFFF
        request = Request(self._next, question, make, answer, tries, interval, context)
        self._table[request.id] = request
        self._next = (self._next + 1) & 0xFFFFFFFF
        return request

    def get(self, request_id: int) -> Request | None:
        """Return the outstanding request of that id."""
        return self._table.get(request_id)

    def close(self, request: Request | None) -> None:
        """Forget a request; None is allowed."""
        if request is not None:
            self._table.pop(request.id, None)

    def take_mac(self, mac1: bytes) -> tuple[Request, float] | None:
        """Return the request that was sent with this mac1, and when; each send only once."""
        for request in self._table.values():
            for item in request.macs:
                if item[0] == mac1:
                    request.macs.remove(item)
                    return request, item[1]
        return None

    def due(self, now: float) -> list[Request]:
        """Return what has waited long enough."""
        return [request for request in self._table.values() if request.due <= now]

    def next_deadline(self) -> float | None:
        """Return when the next one has."""
        return min((request.due for request in self._table.values()), default=None)
