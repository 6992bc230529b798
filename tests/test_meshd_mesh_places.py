"""Nodes in places that look alike, or have nothing in common: one NAT, one LAN prefix, two IP versions.

        +-- router --LAN-- alice, carol (both on port 41820)
WAN ----+
        +-- bob
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from crossedge.lab.natkinds import Collision, NatKind, kind
from crossedge.wire.endpoint import RelayEndpoint
from tests.simworld import SimNode, SimWorld, relayed

# A NAT that steals a port (RFC 4787, REQ-3 forbids it) lets one of two such nodes be heard at a time.
FAIR = [collision for collision in Collision if collision is not Collision.STEAL]
COLLISIONS = [replace(kind("port-restricted"), name=c.value, collision=c) for c in FAIR]
SHARED = [
    *COLLISIONS,
    kind("linux"),
    kind("carrier-grade"),
    kind("symmetric-sequential"),
    kind("hairpinning"),
]


def three(nat: NatKind, bob: str | None) -> tuple[SimWorld, SimNode, SimNode, SimNode]:
    world = SimWorld(seed=2, observers=1)
    router = world.router(nat)
    alice, carol = world.node("alice", router=router), world.node("carol", router=router)
    return world, alice, carol, world.node("bob", bob)


@pytest.mark.parametrize("nat", SHARED, ids=lambda nat: nat.name)
def test_two_nodes_behind_one_nat_with_the_same_port_reach_each_other_and_a_third(
    nat: NatKind,
) -> None:
    world, alice, carol, other = three(nat, "restricted-cone")
    if nat.collision is Collision.REFUSE:  # the second host gets no mapping for its port at all
        world.run(10.0)
        assert not carol.knows(other)
        return
    world.settle(30.0)
    world.run(2.0)
    pairs = [(alice, other), (carol, other), (alice, carol), (other, alice), (other, carol)]
    series = [world.start_pings(a, b, count=240, interval=0.1) for a, b in pairs]
    world.run(20.0)
    assert world.direct(alice, carol)
    assert world.direct(alice, other)
    assert world.direct(carol, other)
    world.run(6.0)
    for pings in series:
        assert [number for number in pings.lost if number > 200] == [], nat.name


def test_two_lans_with_one_prefix_and_one_host_address_each_way() -> None:
    world = SimWorld(seed=4)
    routers = [world.router("linux", lan="192.168.1") for _ in range(3)]
    nodes = [world.node(f"node-{n}", router=router) for n, router in enumerate(routers)]
    nodes.append(world.node("node-3", router=routers[0]))
    world.settle()
    world.run(2.0)
    assert nodes[0].host.addresses == nodes[1].host.addresses == nodes[2].host.addresses
    for a in nodes:
        for b in nodes:
            if a is not b:
                assert world.ping(a, b, count=20, interval=0.05, wait=0.5).lost == []
    assert world.direct(*nodes)
    (endpoint,) = nodes[0].endpoints(nodes[3])
    assert endpoint == nodes[3].host.endpoint(41820), "the one in the same LAN is met there"


def test_ipv6_only_node_meets_an_ipv4_only_one_on_the_relay_and_says_why() -> None:
    world = SimWorld(six=True)
    six, four = world.node("six", six=True), world.node("four", "port-restricted")
    world.settle()
    world.run(2.0)
    pings = world.ping(six, four, count=300, interval=0.05)
    assert pings.lost == []
    assert world.ping(four, six, count=50).lost == []
    for node, other in ((six, four), (four, six)):
        assert relayed(node.endpoints(other))
        (endpoint,) = node.endpoints(other)
        assert isinstance(endpoint, RelayEndpoint)
        assert (":" in endpoint.server.host) is (node is six)
        (row,) = node.mesh.peers(world.net.now)
        assert row["why_not_direct"] == "no address of one IP version in common"
    assert six.sent_to_peers == four.sent_to_peers == 0


def test_two_ipv6_only_nodes_meet_directly() -> None:
    world = SimWorld(six=True)
    one, two = world.node("one", six=True), world.node("two", six=True)
    world.settle()
    world.run(1.0)
    assert world.ping(one, two, count=50).lost == []
    assert world.direct(one, two)
