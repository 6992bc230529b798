"""A node that boots without the right time, or without any rendezvous, gets back the peers that are there."""

from __future__ import annotations

import pytest

from tests.simworld import TODAY, SimNode, SimWorld

YEAR = 365 * 86_400
BACK = 3.0
"""Seconds until a rebooted node talks to a peer whose endpoint holds."""
CLOCKS = pytest.mark.parametrize("unix", [TODAY, 0.0, TODAY + YEAR], ids=["right", "1970", "a-year-ahead"])


def boot(node: SimNode, unix: float) -> None:
    """Start a daemon whose clock says `unix` and is not synchronised, as after a power cut."""
    node.clock_offset = unix - node.world.net.now
    node.synchronised = False
    node.start()


def three() -> tuple[SimWorld, SimNode, SimNode, SimNode]:
    """Return three nodes behind NATs of their own; the first has been talking to both others."""
    world = SimWorld(seed=5, servers=2)
    alice, bob, carol = (world.node(name) for name in ("alice", "bob", "carol"))
    world.settle(30.0)
    world.run(2.0)
    for other in (bob, carol):
        assert world.ping(alice, other, count=100).lost == []
    assert world.direct(alice, bob)
    assert world.direct(alice, carol)
    return world, alice, bob, carol


@CLOCKS
def test_node_that_boots_at_a_wrong_time_has_all_its_peers_back(unix: float) -> None:
    world, alice, bob, carol = three()
    alice.kill()
    world.run(20.0)
    boot(alice, unix)
    for other in (bob, carol):
        assert world.ping(alice, other, count=300).dark <= BACK
        assert world.ping(other, alice, count=100).lost == []
    assert world.direct(alice, bob)
    assert world.direct(alice, carol)
    # Others take its new record, though it was signed by a clock like that.
    world.run(30.0)
    for other in (bob, carol):
        assert other.knows(alice)
        assert world.ping(other, alice, count=50).lost == []


@CLOCKS
def test_with_all_rendezvous_dead_a_rebooted_node_has_the_peers_back_whose_endpoints_hold(
    unix: float,
) -> None:
    world, alice, bob, carol = three()
    for server in world.servers:
        server.kill()
    alice.kill()
    carol.move(world.router())  # nobody is left to tell where it went
    world.run(5.0)
    boot(alice, unix)
    assert world.ping(alice, bob, count=300).dark <= BACK
    assert world.direct(alice, bob)
    assert world.ping(bob, alice, count=100).lost == []
    lost = world.ping(alice, carol, count=50)
    assert len(lost.lost) == 50, "nobody knows where that one is"
    for server in world.servers:
        server.start()
    assert world.wait(lambda: alice.is_direct(carol) and carol.is_direct(alice), 60.0)
    assert world.ping(alice, carol, count=100).lost == []


@CLOCKS
def test_with_all_rendezvous_dead_two_nodes_that_reboot_at_once_meet_again(unix: float) -> None:
    world, alice, bob, _ = three()
    for server in world.servers:
        server.kill()
    alice.kill()
    bob.kill()
    world.run(5.0)
    boot(alice, unix)
    boot(bob, TODAY)
    assert world.ping(alice, bob, count=500).dark <= BACK
    assert world.direct(alice, bob)
