"""When to send which ping, so that two NATs open for each other. It plans; others seal, pay and send.

    try 1     at once on Call and on Called, and again shortly after
    try 2     synchronised as DCUtR does it: the leader calls and waits half the round trip through the
              relay, the other fires when the call reaches it
    pause     longer than an unreplied mapping lives (30 s): a NAT that made a wrong conntrack entry from the
              other side's early packet keeps it alive as long as retries refresh it
    try 3..   synchronised, opening with a packet whose TTL ends before the other side's NAT can see it

The first datagram that arrives from an endpoint is answered by three more, or the other side's NAT may never
open. Of two peers the one with the lower node id leads, so that they do not call each other at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from crossedge.meshd.path import is_private
from crossedge.wire.endpoint import UdpEndpoint

FIRST_TRY: Final = (0.0, 0.1, 0.3, 0.7)  # seconds after the start at which each candidate gets a ping
SYNCHRONISED_TRY: Final = (0.0, 0.05, 0.2)
OPENING_TRY: Final = (0.0, 0.1, 0.3)  # after the opening packet
PRIVATE_TRY: Final = (0.0, 0.2)  # to a LAN address: it answers at once or is not ours
OPENING_TTL: Final = 4  # hops: past our own NATs, not as far as the other side's
OPENING_LEAD: Final = 0.05  # seconds between the opening packet and the first that is meant to arrive
HEARD: Final = (0.0, 0.02, 0.06)  # seconds after the first receive: three more packets
FIRST_TRY_TIME: Final = 2.0  # seconds after which a try without an answer has failed
LATER_TRY_TIME: Final = 1.5
PAUSES: Final = (35.0, 60.0, 120.0, 240.0, 480.0, 600.0)  # seconds; the first exceeds 30 s with room
FOLLOWER_EXTRA: Final = 10.0  # seconds that the one who does not lead waits longer
SAME_CALL: Final = 0.5  # seconds within which calls through several rendezvous are one
CANDIDATES_MAX: Final = 24
HEARD_MAX: Final = 16
SYNC_RTT_MAX: Final = 1.0  # seconds: what a peer may make us wait at most, twice


class Phase(Enum):
    """What a punch is doing."""

    IDLE = "idle"
    TRYING = "trying"
    PAUSED = "paused"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Shot:
    """A ping to send now; `ttl` None is the usual one."""

    endpoint: UdpEndpoint
    attempt: int
    ttl: int | None = None


@dataclass(frozen=True, slots=True)
class CallNow:
    """A call is to be sent now with this attempt; the pings follow by themselves `delay` seconds later."""

    attempt: int


class Punch:
    """The tries to reach one peer directly."""

    __slots__ = (
        "_candidates",
        "_ends",
        "_heard",
        "_leads",
        "_pauses",
        "_queue",
        "_started",
        "attempt",
        "phase",
        "resume",
    )

    def __init__(self, *, leads: bool) -> None:
        """`leads`: our node id is the lower one, so later tries are ours to call for."""
        self._leads = leads
        self._candidates: dict[UdpEndpoint, None] = {}
        self._queue: list[tuple[float, Shot]] = []
        self._heard: dict[UdpEndpoint, None] = {}
        self._ends: float | None = None
        self._pauses = 0
        self._started = float("-inf")
        self.attempt = 0
        self.phase = Phase.IDLE
        self.resume: float | None = None
        """When the pause ends, in seconds of `now`."""

    def start(self, candidates: Iterable[UdpEndpoint], now: float) -> None:
        """Begin with the first try: the pair is cold, or something changed on either side."""
        self._pauses = 0
        self._fire(candidates, 1, now, now)

    def called(self, candidates: Iterable[UdpEndpoint], now: float) -> None:
        """Begin with the first try because the peer did; its calls through several rendezvous are one."""
        if self.phase is Phase.TRYING and self.attempt == 1 and now - self._started < SAME_CALL:
            for endpoint in candidates:
                self.add(endpoint, now)
        else:
            self.start(candidates, now)

    def synchronise(
        self, candidates: Iterable[UdpEndpoint], attempt: int, rtt: float, now: float, *, called: bool
    ) -> None:
        """Begin a later try: at once where we were called, else half of `rtt` (seconds) after our call."""
        delay = 0.0 if called else min(max(rtt, 0.0), SYNC_RTT_MAX) / 2
        self._fire(candidates, max(attempt, 2), now, now + delay)

    def add(self, endpoint: UdpEndpoint, now: float) -> None:
        """Let one more candidate join the try that is going on."""
        if self.phase is not Phase.TRYING or endpoint in self._candidates:
            return
        if len(self._candidates) < CANDIDATES_MAX:
            self._candidates[endpoint] = None
            self._plan(endpoint, now)

    def heard(self, endpoint: UdpEndpoint, now: float) -> None:
        """Answer the first authenticated datagram from an endpoint with three more packets."""
        if self.phase is Phase.DONE or endpoint in self._heard:
            return
        if len(self._heard) >= HEARD_MAX:
            del self._heard[next(iter(self._heard))]
        self._heard[endpoint] = None
        self._queue.extend((now + offset, Shot(endpoint, self.attempt)) for offset in HEARD)

    def done(self) -> None:
        """Stop: a direct path was proven."""
        self._stop(Phase.DONE)

    def reset(self) -> None:
        """Forget everything: the session is closed, or the peer is gone."""
        self._stop(Phase.IDLE)

    def _stop(self, phase: Phase) -> None:
        self.phase = phase
        self._queue.clear()
        self._heard.clear()
        self._candidates.clear()
        self._ends = self.resume = None
        self._pauses = 0
        if phase is Phase.IDLE:
            self.attempt = 0

    def _fire(self, candidates: Iterable[UdpEndpoint], attempt: int, now: float, when: float) -> None:
        self.phase = Phase.TRYING
        self.attempt = min(attempt, 255)
        self._started = now
        self.resume = None
        self._queue.clear()
        self._heard.clear()
        self._candidates = dict.fromkeys(list(candidates)[:CANDIDATES_MAX])
        for endpoint in self._candidates:
            self._plan(endpoint, when)
        self._ends = max(when, now) + (FIRST_TRY_TIME if attempt <= 1 else LATER_TRY_TIME)

    def _plan(self, endpoint: UdpEndpoint, when: float) -> None:
        if is_private(endpoint.host):
            offsets: tuple[float, ...] = PRIVATE_TRY
        elif self.attempt <= 1:
            offsets = FIRST_TRY
        elif self.attempt == 2:
            offsets = SYNCHRONISED_TRY
        else:
            offsets = OPENING_TRY
            self._queue.append((when, Shot(endpoint, self.attempt, OPENING_TTL)))
            when += OPENING_LEAD
        self._queue.extend((when + offset, Shot(endpoint, self.attempt)) for offset in offsets)

    def deadline(self) -> float | None:
        """Return when `take` or `handle_timeout` has something to do."""
        times = [when for when, _ in self._queue]
        if self._ends is not None:
            times.append(self._ends)
        if self.resume is not None:
            times.append(self.resume)
        return min(times, default=None)

    def take(self, now: float) -> list[Shot]:
        """Return the pings that are due."""
        if not self._queue:
            return []
        due = [shot for when, shot in self._queue if when <= now]
        if due:
            self._queue = [item for item in self._queue if item[0] > now]
        return due

    def handle_timeout(self, now: float) -> CallNow | None:
        """End a try that failed, or a pause; return the call that the next try begins with, if it is ours.

        The caller sends the call and begins the try with `synchronise`.
        """
        if self._ends is not None and now >= self._ends:
            self._ends = None
            self._queue.clear()
            if self.attempt == 1 and self._leads:
                return CallNow(2)
            self._pause(now)
        if self.resume is not None and now >= self.resume:
            self.resume = None
            return CallNow(min(max(self.attempt, 2) + 1, 255))
        return None

    def _pause(self, now: float) -> None:
        self.phase = Phase.PAUSED
        pause = PAUSES[min(self._pauses, len(PAUSES) - 1)]
        self._pauses += 1
        self.resume = now + pause + (0.0 if self._leads else FOLLOWER_EXTRA)
