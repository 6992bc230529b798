"""Pings that somebody asked for (`crossedge ping`): probes inside the session, the way that data goes."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Final, NamedTuple

from crossedge.latency.estimator import round_trip
from crossedge.meshd.events import PingResult
from crossedge.meshd.inner import Probe, ProbeReply
from crossedge.wire.endpoint import Endpoint

PINGS_MAX: Final = 32
ANSWER_TIMEOUT: Final = 2.0  # seconds
OPENING_TIMEOUT: Final = 5.0  # seconds that one waits for a session


class _Sent(NamedTuple):
    number: int
    endpoint: Endpoint
    at: float


class UserPings:
    """The pings to one peer that wait for a session or for their answer."""

    __slots__ = ("_name", "_sent", "_waiting", "results")

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: dict[int, float] = {}
        self._sent: dict[int, _Sent] = {}
        self.results: deque[PingResult] = deque(maxlen=2 * PINGS_MAX)

    def ask(self, number: int, now: float) -> None:
        """Want one more; `number` names it in its result."""
        if len(self._waiting) + len(self._sent) >= PINGS_MAX:
            self.results.append(PingResult(self._name, number, None, None, "too many pings at once"))
        else:
            self._waiting[number] = now + OPENING_TIMEOUT

    @property
    def waiting(self) -> list[int]:
        """The numbers that were not sent yet."""
        return list(self._waiting)

    def sent(self, number: int, identity: int, endpoint: Endpoint, now: float) -> None:
        """Note that a ping went out as the probe `identity`."""
        self._waiting.pop(number, None)
        self._sent[identity] = _Sent(number, endpoint, now)

    def leaves(self, probe: Probe, now: float) -> Probe:
        """Return a probe of ours as it leaves now."""
        sent = self._sent.get(probe.id)
        if sent is not None:
            self._sent[probe.id] = sent._replace(at=now)
        return replace(probe, sent=now)

    def replied(self, reply: ProbeReply, stamp: float) -> bool:
        """Take a probe's answer; True if it is one of these."""
        sent = self._sent.pop(reply.id, None)
        if sent is None:
            return False
        rtt = round_trip(sent.at, reply.arrived, reply.answered, stamp)
        self.results.append(PingResult(self._name, sent.number, sent.endpoint, rtt))
        return True

    def handle_timeout(self, now: float) -> None:
        """Give up on what waited for too long."""
        for number, until in list(self._waiting.items()):
            if now >= until:
                del self._waiting[number]
                self.results.append(PingResult(self._name, number, None, None, "no session"))
        for identity, sent in list(self._sent.items()):
            if now - sent.at >= ANSWER_TIMEOUT:
                del self._sent[identity]
                self.results.append(PingResult(self._name, sent.number, sent.endpoint, None, "no answer"))

    def deadline(self) -> float | None:
        """Return when `handle_timeout` has something to do."""
        times = [*self._waiting.values(), *(sent.at + ANSWER_TIMEOUT for sent in self._sent.values())]
        return min(times, default=None)
