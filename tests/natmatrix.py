"""Every pair of NAT kinds, punched in the in-memory internet: who gets through, how soon, for how much.

alice --LAN-- router --WAN--+-- rendezvous      5 % of the packets are lost on each access link, each way
                            +-- STUN server
                            +-- router --LAN-- bob
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from typing import NamedTuple

from crossedge.lab.chance import Chance
from crossedge.lab.internet import Internet
from crossedge.lab.natkinds import Behaviour, NatKind, kind
from crossedge.meshd.events import PathChanged
from crossedge.meshd.netcheck import EXTRA_SOCKETS, Netcheck, NetcheckReport
from crossedge.meshd.punch import Phase
from crossedge.wire.endpoint import RelayEndpoint
from tests.simservers import StunHost
from tests.simworld import PORT, SimNode, SimWorld

NAMES = (
    "full-cone",
    "restricted-cone",
    "port-restricted",
    "port-restricted-random",
    "short-lived",
    "linux",
    "linux-accepting",
    "address-symmetric",
    "symmetric-sequential",
    "symmetric-busy",
    "symmetric-random",
    "corporate",
)
LOSS = 0.05
PINGS = 0.25  # seconds between the packets of the pair's pods
BATCH = 10  # meetings between two collections of garbage
LOOK = 0.02  # seconds between looks whether it is over
HORIZON = 60.0
"""Seconds after which a pair that neither became direct nor gave up counts as stuck."""


class Outcome(NamedTuple):
    """What became of one pair with one seed."""

    direct: bool
    seconds: float
    """From the first packet that wanted the pair until both ends sent data direct (or gave up)."""
    packets: int
    """Sent by both ends towards each other's addresses until then."""
    relayed: bool
    """Whether data took the relay at the end."""
    why: str
    """Why it is not direct, as the node says it; "" where it is."""


@dataclass(frozen=True)
class Row:
    """All seeds of one pair."""

    a: str
    b: str
    theory: bool
    outcomes: tuple[Outcome, ...]

    @property
    def successes(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.direct]


def pairs(names: Sequence[str] = NAMES) -> Iterator[tuple[str, str]]:
    """Yield every unordered pair, a kind with itself included."""
    return combinations_with_replacement(names, 2)


def punchable(a: NatKind, b: NatKind) -> bool:
    """Tell whether simultaneous punching works by RFC 4787's terms, without a guess at any port.

    Both sides send to the endpoint at which a server sees the other one. Where the packet of one arrives, the
    other side answers to its very source, and that passes: so one direction is enough.
    """
    return _arrives(a, b) or _arrives(b, a)


def _arrives(sender: NatKind, receiver: NatKind) -> bool:
    """Tell whether what `sender` sends to the endpoint that a server saw of `receiver` comes in there."""
    filtering = Behaviour.ADDRESS_AND_PORT_DEPENDENT if receiver.conntrack else receiver.filtering
    if filtering is Behaviour.ENDPOINT_INDEPENDENT:
        return True  # the mapping towards the server takes packets from anybody
    if receiver.hard:
        return False  # its mapping towards the sender has another port
    return filtering is Behaviour.ADDRESS_DEPENDENT or not sender.hard


@cache
def report(name: str) -> NetcheckReport:
    """Return what the network check finds behind a NAT of this kind; once for all seeds."""
    net = Internet(seed=1)
    servers = [StunHost(net, net.host(f"stun{n}", addresses=2)).endpoint for n in range(2)]
    node = net.router("router", name).host("node")
    ports = [PORT, *range(50_100, 50_100 + 7 * EXTRA_SOCKETS, 7)]
    check = Netcheck(servers, ports, node.addresses, net.random, net.now)
    node.attach(check, sockets=[(None, port) for port in ports], indexed=True)
    net.run_while(lambda: check.report is None, 10.0)
    if check.report is None:
        raise RuntimeError(f"no report of {name}")
    return check.report


class Meeting:
    """Two nodes behind two NATs, one rendezvous, one STUN server."""

    def __init__(self, a: str, b: str, seed: int, loss: float = LOSS) -> None:
        chance = Chance(f"{a} {b} {seed}").bits()  # or the same packets are lost in every pair
        self.world = SimWorld(chance, loss=loss, observers=1)
        self.alice, self.bob = (self._node(name, nat) for name, nat in (("alice", a), ("bob", b)))
        limit = self.world.net.now + 30.0
        while not all(self._ready(node) for node in self.nodes):
            self.world.run(LOOK)
            if self.world.net.now > limit:
                raise RuntimeError(f"{a} and {b}, seed {seed}: not registered within 30 s")

    @property
    def nodes(self) -> tuple[SimNode, SimNode]:
        return self.alice, self.bob

    def _node(self, name: str, nat: str) -> SimNode:
        node = self.world.node(name, nat)
        control = node.mesh.control
        control.nat.report = report(nat)
        control.nat.set_verdict(control.nat.report.verdict, self.world.net.now)
        node.host.wake()
        return node

    def _ready(self, node: SimNode) -> bool:
        """Tell whether a node knows the other one, and two observers see it."""
        other = self.bob if node is self.alice else self.alice
        return node.knows(other) and len(node.mesh.control.candidates.observed_by()) == 2

    def run(self, horizon: float = HORIZON) -> Outcome:
        """Let data flow until both ends send it direct, or both have given up for now."""
        world, (alice, bob) = self.world, self.nodes
        at, theirs = alice.peer(bob), bob.peer(alice)
        before = self._packets()
        start = now = world.net.now
        world.start_pings(alice, bob, count=int(horizon / PINGS), interval=PINGS)
        direct = given_up = False
        while not direct and not given_up and now < start + horizon:
            world.run(LOOK)
            now = world.net.now
            direct = at.way.direct is not None and theirs.way.direct is not None
            given_up = all(peer.punch.phase is Phase.SPENT and peer.link.endpoints for peer in (at, theirs))
        if direct:
            now = max(self._last_move(node) for node in self.nodes)
        ends = (at.link.endpoints, theirs.link.endpoints)
        relayed = all(any(isinstance(e, RelayEndpoint) for e in endpoints) for endpoints in ends)
        why = "" if direct else str(alice.mesh.peers(now)[0]["why_not_direct"])
        return Outcome(direct, now - start, self._packets() - before, relayed, why)

    @staticmethod
    def _last_move(node: SimNode) -> float:
        """Return when a node's data took the way that it takes now."""
        return max(when for when, event in node.events if isinstance(event, PathChanged))

    def _packets(self) -> int:
        return sum(node.sent_to_peers for node in self.nodes)


@contextmanager
def _rare_collection() -> Iterator[None]:
    """Collect garbage by hand: all that was made before stays, and a meeting is a cycle as a whole."""
    enabled = gc.isenabled()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def meet(a: str, b: str, seeds: Sequence[int], loss: float = LOSS) -> Row:
    """Return what becomes of one pair under each seed."""
    outcomes = []
    with _rare_collection():
        for seed in seeds:
            outcomes.append(Meeting(a, b, seed, loss).run())
            if len(outcomes) % BATCH == 0:
                gc.collect()
    return Row(a, b, punchable(kind(a), kind(b)), tuple(outcomes))
