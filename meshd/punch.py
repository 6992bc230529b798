"""When to send which ping, so that two NATs open for each other. It plans; others seal, pay and send.

    try 1     at once on Call and on Called, and again shortly after, to every known endpoint
    try 2..   as `natplan` says and `latertries` prepares: from fresh sockets, whose endpoints or predicted
              ports the calls tell; opening with a packet whose TTL ends before the other side's NAT
    pauses    after each later try, longer each time; a birthday spray is tried twice and then not until
              something changes

Fresh ports, because a NAT that made a wrong conntrack entry from an early packet keeps that entry alive as
long as tries from the same port refresh it. Where nobody can say how a fresh socket is seen, later tries are
made from the daemon's own port, synchronised as DCUtR does it: the caller waits half the round trip through
the relay, the called fires when the call reaches it.

The first datagram that arrives from an endpoint is answered by three more, or the other side's NAT may never
open. `natplan` says which of two peers begins the later tries, so that they do not call each other at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Final, TypeAlias

from crossedge.meshd.natplan import FIRST_TRY_TIME, Method, Plan
from crossedge.meshd.path import is_private
from crossedge.wire.endpoint import DirectEndpoint, UdpEndpoint, remote_of

FIRST_TRY: Final = (0.0, 0.1, 0.3, 0.7)  # seconds after the start at which each candidate gets a ping
SYNCHRONISED_TRY: Final = (0.0, 0.05, 0.2)
OPENING_TRY: Final = (0.0, 0.1, 0.3)  # after the opening packet
PRIVATE_TRY: Final = (0.0, 0.2)  # to a LAN address: it answers at once or is not ours
OPENING_TTL: Final = 4  # hops: past our own NATs, not as far as the other side's
OPENING_LEAD: Final = 0.05  # seconds between the opening packet and the first that is meant to arrive
HEARD: Final = (0.0, 0.02, 0.06)  # seconds after the first receive: three more packets
LATER_TRY_TIME: Final = 1.5  # seconds after which a later try without an answer has failed
FOLLOWER_EXTRA: Final = 5.0  # seconds that the one who does not begin waits longer
SAME_CALL: Final = 0.5  # seconds within which calls through several rendezvous are one
CANDIDATES_MAX: Final = 24
HEARD_MAX: Final = 16
SYNC_RTT_MAX: Final = 1.0  # seconds: what a peer may make us wait at most, twice


class Phase(Enum):
    """What a punch is doing."""

    IDLE = "idle"
    TRYING = "trying"
    PAUSED = "paused"
    SPENT = "spent"
    """Everything was tried; nothing more is sent until something changes."""
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Shot:
    """A ping to send now; `ttl` None is the usual one."""

    endpoint: DirectEndpoint
    attempt: int
    ttl: int | None = None
    short: bool = False
    """Whether it answers a ping and must not be longer than that paid for."""


@dataclass(frozen=True, slots=True)
class Volley:
    """One ping to many endpoints at once, of which at most a few can arrive."""

    targets: tuple[DirectEndpoint, ...]
    attempt: int
    ttl: int | None = None
    spray: bool = False
    """Whether it belongs to a birthday spray, which has a purse of its own."""


Plannable: TypeAlias = Shot | Volley


@dataclass(frozen=True, slots=True)
class CallNow:
    """A call is to be sent now with this attempt; the pings follow by themselves `delay` seconds later."""

    attempt: int


class Punch:
    """The tries to reach one peer directly."""

    __slots__ = (
        "_candidates",
        "_ends",
        "_failed",
        "_heard",
        "_queue",
        "_started",
        "attempt",
        "phase",
        "resume",
    )

    def __init__(self) -> None:
        self._candidates: dict[DirectEndpoint, None] = {}
        self._queue: list[tuple[float, Plannable]] = []
        self._heard: dict[DirectEndpoint, None] = {}
        self._ends: float | None = None
        self._failed = 0
        self._started = float("-inf")
        self.attempt = 0
        self.phase = Phase.IDLE
        self.resume: float | None = None
        """When the pause ends, in seconds of `now`."""

    def start(self, candidates: Iterable[UdpEndpoint], now: float, lasts: float = FIRST_TRY_TIME) -> None:
        """Begin with the first try, of `lasts` seconds: the pair is cold, or something changed somewhere."""
        self._failed = 0
        self._fire(candidates, 1, now, now, lasts)

    def called(self, candidates: Iterable[UdpEndpoint], now: float, lasts: float = FIRST_TRY_TIME) -> None:
        """Begin with the first try because the peer did; its calls through several rendezvous are one."""
        if self.phase is Phase.TRYING and self.attempt == 1 and now - self._started < SAME_CALL:
            for endpoint in candidates:
                self.add(endpoint, now)
        else:
            self.start(candidates, now, lasts)

    def synchronise(
        self, candidates: Iterable[UdpEndpoint], attempt: int, rtt: float, now: float, *, called: bool
    ) -> None:
        """Make a later try from our own port: at once where we were called, else `rtt`/2 after our call."""
        delay = 0.0 if called else min(max(rtt, 0.0), SYNC_RTT_MAX) / 2
        self._fire(candidates, max(attempt, 2), now, now + delay, LATER_TRY_TIME)

    def later(self, attempt: int, now: float, lasts: float) -> None:
        """Begin a later try whose pings come one by one (see `add_shots`); it fails after `lasts` seconds."""
        self._fire((), max(attempt, 2), now, now, lasts)

    def postpone(self, until: float) -> None:
        """Make this try later instead: what it needs is in use. It has not failed."""
        self.phase = Phase.PAUSED
        self.attempt = max(self.attempt - 1, 1)
        self._ends = None
        self._queue.clear()
        self.resume = until

    def prolong(self, until: float) -> None:
        """Let the try that is going on fail at another time."""
        if self._ends is not None:
            self._ends = until

    def add_shots(self, shots: Iterable[tuple[float, Plannable]]) -> None:
        """Plan pings, each with the time at which it is due."""
        if self.phase is Phase.TRYING:
            self._queue.extend(shots)

    def add(self, endpoint: UdpEndpoint, now: float) -> None:
        """Let one more candidate join the first try, while that is going on."""
        if self.phase is not Phase.TRYING or self.attempt > 1 or endpoint in self._candidates:
            return
        if len(self._candidates) < CANDIDATES_MAX:
            self._candidates[endpoint] = None
            self._plan(endpoint, now)

    def heard(self, endpoint: DirectEndpoint, now: float, *, short: bool = True) -> None:
        """Answer the first authenticated datagram from an endpoint with three more packets.

        They are `short` where what came from there pays for them. No guess is needed any more.
        """
        if self.phase is Phase.DONE or endpoint in self._heard:
            return
        if len(self._heard) >= HEARD_MAX:
            del self._heard[next(iter(self._heard))]
        self._heard[endpoint] = None
        self._queue = [item for item in self._queue if not isinstance(item[1], Volley)]
        self._queue.extend((now + offset, Shot(endpoint, self.attempt, short=short)) for offset in HEARD)

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
        self._failed = 0
        if phase is Phase.IDLE:
            self.attempt = 0

    def _fire(
        self, candidates: Iterable[UdpEndpoint], attempt: int, now: float, when: float, lasts: float
    ) -> None:
        self.phase = Phase.TRYING
        self.attempt = min(attempt, 255)
        self._started = now
        self.resume = None
        self._queue.clear()
        self._heard.clear()
        self._candidates = dict.fromkeys(list(candidates)[:CANDIDATES_MAX])
        for endpoint in self._candidates:
            self._plan(endpoint, when)
        self._ends = max(when, now) + lasts

    def _plan(self, endpoint: DirectEndpoint, when: float) -> None:
        if is_private(remote_of(endpoint).host):
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

    def take(self, now: float) -> list[Plannable]:
        """Return the pings that are due."""
        if not self._queue:
            return []
        due = [shot for when, shot in self._queue if when <= now]
        if due:
            self._queue = [item for item in self._queue if item[0] > now]
        return due

    def handle_timeout(self, now: float, plan: Plan) -> CallNow | None:
        """End a try that failed, or a pause; return the call that the next try begins with, if it is ours.

        The caller prepares that try, or asks the peer for it where `plan` has the peer begin.
        """
        if self._ends is not None and now >= self._ends:
            self._ends = None
            self._queue.clear()
            if self.attempt == 1 and plan.begins and plan.method is not Method.NONE:
                return CallNow(2)
            self._failed += self.attempt > 1
            self._pause(now, plan)
        if self.resume is not None and now >= self.resume:
            self.resume = None
            return CallNow(min(max(self.attempt, 1) + 1, 255))
        return None

    def _pause(self, now: float, plan: Plan) -> None:
        pause = plan.pause(self._failed)
        self.phase = Phase.SPENT if pause == inf else Phase.PAUSED
        self.resume = None if pause == inf else now + pause + (0.0 if plan.begins else FOLLOWER_EXTRA)
