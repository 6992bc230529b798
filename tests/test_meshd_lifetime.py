"""How long an idle mapping lives: measured behind every NAT, under loss, and used for keepalives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from crossedge.lab.internet import Conditions, Internet, Transmit
from crossedge.lab.natkinds import NatKind, kind
from crossedge.meshd.lifetime import LADDER, SETTLE, SHORTEST, SOCKETS, LifetimeCheck
from crossedge.meshd.netcheck import EXTRA_SOCKETS
from crossedge.meshd.peer import ACTIVE_TIME
from crossedge.wire.endpoint import SocketEndpoint, UdpEndpoint
from tests.simservers import StunHost
from tests.simworld import PORT, SimWorld

LONGEST = LADDER[-1] + SETTLE + 5.0


class Node:
    """A node whose further sockets are 0 to 4."""

    def __init__(self, nat: NatKind, loss: float = 0.0) -> None:
        self.net = Internet(seed=3)
        self.server = StunHost(self.net, self.net.host("server"))
        host = self.net.router("router", nat, link=Conditions(delay=0.02, loss=loss)).host("node")
        self.check = LifetimeCheck(self.server.endpoint, range(SOCKETS), self.net.random, self.net.now)
        self.sent = 0
        host.attach(self, sockets=[(None, 50_000 + 7 * n) for n in range(SOCKETS)], indexed=True)

    def receive(self, datagram: bytes, source: UdpEndpoint, local: int, now: float) -> None:
        self.check.receive(datagram, SocketEndpoint(source, local), now)

    def poll_transmit(self) -> Transmit | None:
        item = self.check.poll_transmit()
        self.sent += item is not None
        return None if item is None else Transmit(item[0].remote, item[1], None, item[0].local)

    def next_deadline(self) -> float | None:
        return self.check.next_deadline()

    def handle_timeout(self, now: float) -> None:
        self.check.handle_timeout(now)

    def measure(self) -> int | None:
        self.net.run_while(lambda: not self.check.done, LONGEST + 5.0)
        assert self.check.done
        return self.check.lifetime


@pytest.mark.parametrize("loss", [0.0, 0.05])
@pytest.mark.parametrize(
    "name", ["full-cone", "port-restricted", "symmetric-random", "hairpinning", "firewall"]
)
@pytest.mark.parametrize(
    ("lives", "found"), [(10.0, SHORTEST), (20.0, 13), (30.0, 28), (60.0, 58), (120.0, 118), (600.0, 118)]
)
def test_lifetime_is_found_to_the_step_below(name: str, lives: float, found: float, loss: float) -> None:
    nat = replace(kind("full-cone" if name == "firewall" else name), lifetime=lives, lifetime_unreplied=None)
    node = Node(nat, loss)
    assert node.measure() == found
    assert node.sent < 60


def test_flow_that_goes_on_is_what_counts_with_netfilter() -> None:
    assert Node(kind("linux")).measure() == 118


def test_server_that_is_silent_leaves_it_unknown() -> None:
    node = Node(kind("linux"))
    node.net.hosts["server"].detach()
    assert node.measure() is None
    assert node.check.why == "no mapping could be tested"


def test_daemon_measures_after_its_network_check_and_idle_paths_follow_both_nats() -> None:
    world = SimWorld(observers=1, unreachable_after=3600.0)
    alice, bob = world.node("alice", "port-restricted"), world.node("bob", "linux")
    world.settle()
    world.run(1.0)
    for node in (alice, bob):
        node.mesh.begin_netcheck([PORT, *range(51_000, 51_000 + EXTRA_SOCKETS)], world.net.now)
        for port in range(51_000, 51_000 + EXTRA_SOCKETS):
            node.host.open(port)
        node.host.wake()
    world.run(10.0)
    assert len(alice.mesh.services.sockets) == SOCKETS
    world.ping(alice, bob, count=10)
    assert alice.mesh.services.keepalive(alice.peer(bob)) == 20.0
    world.run(LONGEST)
    assert alice.mesh.control.nat.verdict.lifetime == bob.mesh.control.nat.verdict.lifetime == 118
    assert len(alice.mesh.services.sockets) == 0
    assert alice.mesh.control.nat.report is not None
    assert alice.mesh.control.nat.report.as_dict()["findings"]["lifetime"]["value"] == "118 s"
    world.run(2.0)
    world.ping(alice, bob, count=10)
    assert alice.mesh.services.keepalive(alice.peer(bob)) == pytest.approx(118 * 0.8)
    world.run(ACTIVE_TIME + 5.0)
    before = alice.sent_to_peers
    world.run(200.0)
    assert alice.sent_to_peers - before < 12
    assert world.ping(alice, bob, count=20).lost == []
    assert world.direct(alice, bob)
