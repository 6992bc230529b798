"""The tries after the first: prepared with fresh sockets, told to the peer by a call, fired together.

    fresh port    leader                                 follower
                  a fresh socket asks a STUN server
                  Call (where it is seen)  ---------->   a fresh socket asks a STUN server
                                                         opens towards the leader's
                  opens towards the follower's  <-----   Call (where it is seen)
                  pings it                    <------>   pings the leader's

    prediction    opener                                 prober
    and birthday  (a fresh socket asks a STUN server)
                  many more open towards the prober
                  Call (predicted ports)  ----------->   pings these ports, or many random ones

With two predictable NATs each side opens from many sockets towards the one port that the other predicts for
itself, in the order of the first drawing. Opening packets have a small TTL: they make the mapping in our own
NAT and end before the other side's NAT, which might take offence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Final

from crossedge.meshd.natplan import Method, Plan, Role
from crossedge.meshd.path import is_private
from crossedge.meshd.peerport import Port
from crossedge.meshd.punch import (
    LATER_TRY_TIME,
    OPENING_LEAD,
    OPENING_TTL,
    SYNC_RTT_MAX,
    Phase,
    Plannable,
    Shot,
    Volley,
)
from crossedge.wire.endpoint import SocketEndpoint, UdpEndpoint

if TYPE_CHECKING:
    from crossedge.meshd.peer import MeshPeer

SCOUT_TIME: Final = 1.2  # seconds for a STUN server to say where a fresh socket is seen
ANSWER_TIME: Final = 2.0  # seconds for the peer to answer our call
CALL_AGAIN: Final = (0.4, 0.6)  # seconds between our calls of one try: a rendezvous hands one over once
SHOTS: Final = (0.0, 0.1, 0.3)  # seconds after the lead
TARGETS_MAX: Final = 2  # endpoints of the peer's call that are tried

PREDICT_SOCKETS: Final = 16
PREDICT_PLACES: Final = (4, 9)  # in the sequence: which of our sockets' ports the prober is told
LEADER_SOCKETS: Final = 24  # more, and further ahead: others take ports until the follower has answered
LEADER_PLACE: Final = 12
FOLLOWER_SOCKETS: Final = 12
FOLLOWER_PLACE: Final = 4
MUTUAL_VOLLEYS: Final = (0.0, 0.12)

SPRAY_SOCKETS: Final = 192
SPRAY_PROBES: Final = 1280  # with 192 of 64,512 ports open: 98 % find one
SPRAY_BATCH: Final = 16
SPRAY_INTERVAL: Final = 0.03  # seconds between batches: 533 probes a second
SPRAY_OPENING: Final = 0.005  # seconds between batches of opening packets
SPRAY_TIME: Final = SPRAY_PROBES / SPRAY_BATCH * SPRAY_INTERVAL + 1.0
SPRAY_PORTS: Final = (1024, 65_535)


PREDICTED: Final[dict[Role, tuple[int, tuple[int, ...]]]] = {
    Role.OPENER: (PREDICT_SOCKETS, PREDICT_PLACES),
    Role.LEADER: (LEADER_SOCKETS, (LEADER_PLACE,)),
    Role.FOLLOWER: (FOLLOWER_SOCKETS, (FOLLOWER_PLACE,)),
}
"""How many sockets a side opens, and the ports of which of them it tells."""


class Stage(Enum):
    """What a later try is waiting for."""

    NONE = "nothing"
    SCOUTING = "a STUN server's answer"
    CALLING = "the peer's answer to our call"
    FIRED = "a packet of the peer"


class LaterTries:
    """The later tries with one peer."""

    __slots__ = (
        "_again",
        "_answering",
        "_calls",
        "_ends",
        "_fresh",
        "_locals",
        "_peer",
        "_plan",
        "_port",
        "_stage",
        "_targets",
    )

    def __init__(self, peer: MeshPeer, port: Port) -> None:
        self._peer = peer
        self._port = port
        self._plan = Plan()
        self._stage = Stage.NONE
        self._locals: tuple[int, ...] = ()
        self._fresh: tuple[UdpEndpoint, ...] = ()
        self._targets: tuple[UdpEndpoint, ...] = ()
        self._answering = False
        self._calls = 0
        self._again: float | None = None
        self._ends: float | None = None

    @property
    def sockets(self) -> tuple[int, ...]:
        """The fresh sockets of the try that is going on."""
        return self._locals

    def begin(self, attempt: int, now: float) -> None:
        """Begin a try, or ask the peer to begin one where that is its part."""
        plan = self._peer.plan()
        if plan.begins:
            self._prepare(plan, attempt, (), now, answering=False)
            return
        self.end()
        self._peer.punch.later(attempt, now, ANSWER_TIME)
        self._port.call(self._peer, attempt, now, ())

    def called(self, attempt: int, offered: Sequence[UdpEndpoint], now: float) -> None:
        """Take a call for a later try; it names the endpoints or ports that the peer has just opened."""
        plan, punch = self._peer.plan(), self._peer.punch
        offered = [endpoint for endpoint in offered if ":" not in endpoint.host]
        going_on = punch.phase is Phase.TRYING and punch.attempt == attempt
        if plan.role is Role.PROBER:
            self._probe(plan, attempt, offered, now, going_on=going_on)
        elif plan.role is Role.FOLLOWER and offered:
            if going_on and self._stage is Stage.FIRED:
                self._call(now)  # our answer was lost
            elif not (going_on and self._stage is Stage.SCOUTING):
                self._prepare(plan, attempt, offered, now, answering=True)
        elif going_on and self._stage is Stage.CALLING and offered:
            self._targets = tuple(offered[:TARGETS_MAX])
            self._fire(now)
        elif not going_on and not offered and plan.begins:
            self._prepare(plan, attempt, (), now, answering=False)
        elif not going_on and offered:
            punch.synchronise(offered, attempt, 0.0, now, called=True)

    def scouted(self, local: int, mapped: UdpEndpoint, now: float) -> None:
        """Take the news where a fresh socket is seen."""
        if self._stage is not Stage.SCOUTING or local != self._locals[0]:
            return
        if self._plan.method is Method.PREDICT:
            _, places = PREDICTED[self._plan.role]
            step = self._port.port_step()
            self._fresh = tuple(UdpEndpoint(mapped.host, _port(mapped.port + step * at)) for at in places)
        else:
            self._fresh = (mapped,)
        self._opened(now)

    def end(self) -> None:
        """Forget the try; its sockets are freed where no path uses them."""
        self._stage = Stage.NONE
        self._again = self._ends = None
        self._locals = self._fresh = self._targets = ()

    def deadline(self) -> float | None:
        """Return when `handle_timeout` has something to do."""
        return min((when for when in (self._again, self._ends) if when is not None), default=None)

    def handle_timeout(self, now: float) -> None:
        """Call again, or go on without fresh sockets where no STUN server answers."""
        if self._ends is not None and now >= self._ends:
            self._ends = None
            if self._stage is Stage.SCOUTING:
                self._without_sockets(now)
        if self._again is not None and now >= self._again:
            self._again = None
            if self._peer.punch.phase is Phase.TRYING and self._stage in (Stage.CALLING, Stage.FIRED):
                self._call(now)

    # --- Preparing --------------------------------------------------------------------------------------

    def _prepare(
        self, plan: Plan, attempt: int, targets: Sequence[UdpEndpoint], now: float, *, answering: bool
    ) -> None:
        self.end()
        self._plan, self._answering, self._calls = plan, answering, 0
        self._targets = tuple(targets[:TARGETS_MAX])
        punch = self._peer.punch
        punch.later(attempt, now, SCOUT_TIME + ANSWER_TIME)
        count = 1
        if plan.method is Method.SPRAY:
            count = SPRAY_SOCKETS
            begin = self._port.begin_spray(now)
            if begin > now:
                punch.postpone(begin)
                return
        elif plan.method is Method.PREDICT:
            count = 1 + PREDICTED[plan.role][0]
        self._locals = self._port.take_sockets(self._peer, count)
        self._stage = Stage.SCOUTING
        self._ends = now + SCOUT_TIME
        if not self._locals:
            self._without_sockets(now)
        elif plan.method is Method.SPRAY:
            self._opened(now)
        elif not self._port.scout(self._locals[0], now):
            self._without_sockets(now)

    def _without_sockets(self, now: float) -> None:
        """Make the try from our own port."""
        attempt, answering, targets = self._peer.punch.attempt, self._answering, self._targets
        self.end()
        if self._plan.method is Method.SPRAY:
            self._peer.punch.prolong(now)  # another spray has the sockets: later
            return
        candidates: Iterable[UdpEndpoint] = dict.fromkeys([*targets, *self._peer.offers.candidates()])
        self._port.call(self._peer, attempt, now)
        self._peer.punch.synchronise(candidates, attempt, self._peer.paths.relay_rtt(), now, called=answering)

    def _opened(self, now: float) -> None:
        """Go on with sockets that are seen, or predicted, at `_fresh`."""
        self._ends = None
        if self._plan.role is Role.OPENER:
            self._targets = self._peer_endpoints()
            self._fire(now)
            self._call(now)
        elif self._answering:
            self._fire(now)
            self._call(now)
        else:
            self._stage = Stage.CALLING
            self._peer.punch.prolong(now + ANSWER_TIME)
            self._call(now)

    def _call(self, now: float) -> None:
        self._port.call(self._peer, self._peer.punch.attempt, now, self._fresh)
        if self._calls < len(CALL_AGAIN) and not self._answering:
            self._again = now + CALL_AGAIN[self._calls]
        self._calls += 1

    def _peer_endpoints(self) -> tuple[UdpEndpoint, ...]:
        """Return where an easy peer is seen from outside: its favourite public endpoint."""
        known = self._peer.offers.candidates()
        return tuple(each for each in known if not is_private(each.host) and ":" not in each.host)[:1]

    # --- Firing -----------------------------------------------------------------------------------------

    def _fire(self, now: float) -> None:
        self._stage = Stage.FIRED
        self._again = None
        plan, punch = self._plan, self._peer.punch
        rtt = min(max(self._peer.paths.relay_rtt(), 0.0), SYNC_RTT_MAX)
        lead = OPENING_LEAD + (rtt / 2 if self._answering else 0.0)
        shots: list[tuple[float, Plannable]] = []
        lasts = LATER_TRY_TIME + rtt
        if plan.method is Method.FRESH:
            ends = [SocketEndpoint(target, self._locals[0]) for target in self._targets]
            shots += [(now, Shot(end, punch.attempt, OPENING_TTL)) for end in ends]
            shots += [(now + lead + at, Shot(end, punch.attempt)) for at in SHOTS for end in ends]
        elif plan.role is Role.OPENER:
            spray = plan.method is Method.SPRAY
            lasts += SPRAY_TIME if spray else 0.0
            own = self._locals if spray else self._locals[1:]
            for index, start in enumerate(range(0, len(own), SPRAY_BATCH)):
                batch = own[start : start + SPRAY_BATCH]
                shots.append((now + index * SPRAY_OPENING, self._volley(batch, OPENING_TTL, spray=spray)))
        else:
            own = self._locals[1:]
            if self._answering:
                shots.append((now, self._volley(own, OPENING_TTL)))
            shots += [(now + lead + at, self._volley(own)) for at in MUTUAL_VOLLEYS]
        punch.add_shots(shots)
        punch.prolong(now + lead + lasts)

    def _volley(self, own: Sequence[int], ttl: int | None = None, *, spray: bool = False) -> Volley:
        targets = tuple(SocketEndpoint(target, local) for target in self._targets[:1] for local in own)
        return Volley(targets, self._peer.punch.attempt, ttl, spray)

    def _probe(
        self, plan: Plan, attempt: int, offered: Sequence[UdpEndpoint], now: float, *, going_on: bool
    ) -> None:
        """Try what the opener opened: the ports that it predicts, or many random ones of its address."""
        punch = self._peer.punch
        if plan.method is Method.PREDICT:
            targets = offered[:TARGETS_MAX]
            if not going_on:
                punch.later(attempt, now, LATER_TRY_TIME)
            punch.add_shots((now + at, Shot(target, attempt)) for at in SHOTS for target in targets)
            return
        host = self._port.spray_target(self._peer)
        if going_on or host is None:
            return
        punch.later(attempt, now, SPRAY_TIME)
        ports = self._port.draw_ports(SPRAY_PROBES, *SPRAY_PORTS)
        shots: list[tuple[float, Plannable]] = []
        for index, start in enumerate(range(0, len(ports), SPRAY_BATCH)):
            targets = [UdpEndpoint(host, port) for port in ports[start : start + SPRAY_BATCH]]
            shots.append((now + index * SPRAY_INTERVAL, Volley(tuple(targets), attempt, spray=True)))
        punch.add_shots(shots)


def _port(number: int) -> int:
    """Return a port number that may have run over the end of the range."""
    low, high = SPRAY_PORTS
    return low + (number - low) % (high - low + 1)
