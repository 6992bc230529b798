"""What two NAT verdicts mean for a pair: which way to punch, who begins, and when to leave it.

A NAT is *easy* if it maps independently of the destination (RFC 4787, 4.1): the endpoint that a server sees
is the one that peers reach. Behind a *hard* one each destination sees another port. Three things help then:

    a fresh port    both sides take a new socket, ask a STUN server where it is seen, tell each other
    prediction      ports are given in order: a fresh socket shows where the sequence stands, some more send
                    at once, and the other side is told the ports that they must have got
    birthday        ports are random: many sockets send to the other side's endpoint, which tries many ports

Whoever opens the sockets is the *opener*, the other side the *prober*. It only works where what the prober
sends passes the opener's filter: the prober is easy, or the opener's NAT minds addresses alone. With two
predictable NATs each side opens towards the port that the other one predicts for itself. The rest stays on
the relay.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Final

from crossedge.wire.record import Allocation, Behaviour, NatVerdict

HARD: Final = (Behaviour.ADDRESS_DEPENDENT, Behaviour.ADDRESS_AND_PORT_DEPENDENT)
OPEN: Final = (Behaviour.NONE, Behaviour.ENDPOINT_INDEPENDENT, Behaviour.ADDRESS_DEPENDENT)

FIRST_TRY_TIME: Final = 2.0  # seconds after which the first try has failed
HOPELESS_TRY_TIME: Final = 0.5  # the same where the verdicts say that it cannot work


class Nature(Enum):
    """What can be known of the outer port towards a peer."""

    EASY = "the same for all"
    PREDICTABLE = "in order"
    RANDOM = "random"


class Method(Enum):
    """How the tries after the first are made."""

    FRESH = "fresh ports"
    PREDICT = "predicted ports"
    SPRAY = "a birthday spray"
    NONE = "none"


class Role(Enum):
    """What a side does in them."""

    OPENER = "opener"
    PROBER = "prober"
    LEADER = "leader"
    FOLLOWER = "follower"


PAUSES: Final[dict[Method, tuple[float, ...]]] = {
    Method.FRESH: (8.0, 20.0, 40.0, 60.0),
    Method.PREDICT: (8.0, 30.0, 120.0, 600.0),
    Method.SPRAY: (40.0, inf),
    Method.NONE: (inf,),
}
"""Seconds after each later try that failed, the last one repeats; no end: until something changes. Opened
mappings must have ended before a spray is repeated, or a router's table fills up."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a pair is punched, as one side sees it."""

    method: Method = Method.FRESH
    role: Role = Role.LEADER
    likely: bool = True
    """Whether the first try, to known ports, can work by what the verdicts say."""
    reason: str = ""
    """Why a pair that is not direct is not, as far as its NATs are the cause."""

    @property
    def begins(self) -> bool:
        """Whether the later tries are ours to begin."""
        return self.role in (Role.LEADER, Role.OPENER)

    @property
    def first_time(self) -> float:
        """Seconds that the first try lasts."""
        return FIRST_TRY_TIME if self.likely else HOPELESS_TRY_TIME

    def pause(self, failed: int) -> float:
        """Return the seconds to wait after so many later tries failed; `inf`: until something changes."""
        pauses = PAUSES[self.method]
        return pauses[min(max(failed, 1), len(pauses)) - 1]


def nature(verdict: NatVerdict) -> Nature:
    """Return what a verdict says of ports; what was not measured counts as easy, which costs nothing."""
    if verdict.mapping not in HARD:
        return Nature.EASY
    return Nature.PREDICTABLE if verdict.allocation is Allocation.SEQUENTIAL else Nature.RANDOM


def plan(ours: NatVerdict, theirs: NatVerdict, *, leads: bool) -> Plan:
    """Return how to punch; `leads`: our node id is the lower one, which decides where nothing else does."""
    one, two = nature(ours), nature(theirs)
    reason = _reason(ours, theirs)
    equals = Role.LEADER if leads else Role.FOLLOWER
    if one is two is Nature.EASY or _is_open(ours) or _is_open(theirs):
        return Plan(Method.FRESH, equals, reason=reason)
    for wanted, method in ((Nature.PREDICTABLE, Method.PREDICT), (Nature.RANDOM, Method.SPRAY)):
        opener, prober = (nat is wanted for nat in (one, two))
        opener, prober = opener and _opens(ours, theirs), prober and _opens(theirs, ours)
        if opener or prober:
            mine = leads if opener and prober else opener
            return Plan(method, Role.OPENER if mine else Role.PROBER, likely=False, reason=reason)
    if one is two is Nature.PREDICTABLE:
        return Plan(Method.PREDICT, equals, likely=False, reason=reason)
    return Plan(Method.NONE, equals, likely=False, reason=reason)


def _is_open(receiver: NatVerdict) -> bool:
    """Tell whether a packet from an unknown port comes in at the endpoint that a server saw."""
    return nature(receiver) is Nature.EASY and receiver.filtering in OPEN


def _opens(opener: NatVerdict, prober: NatVerdict) -> bool:
    """Tell whether a prober's packet passes the opener's filter, and the answer to it the prober's."""
    if nature(prober) is Nature.EASY:
        return True
    return opener.mapping is Behaviour.ADDRESS_DEPENDENT and opener.filtering in OPEN


def _reason(ours: NatVerdict, theirs: NatVerdict) -> str:
    found = [
        f"{whose} NAT gives each destination another port, {nature(verdict).value}"
        for whose, verdict in (("our", ours), ("the peer's", theirs))
        if nature(verdict) is not Nature.EASY
    ]
    return "; ".join(found)
