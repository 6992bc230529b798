"""What whole nodes survive: rendezvous and daemons killed, networks that change, paths that die one way."""

from __future__ import annotations

import pytest

from crossedge.meshd import events as ev
from crossedge.wire.endpoint import RelayEndpoint, UdpEndpoint
from tests.simworld import TODAY, SimNode, SimWorld, relayed

SEEDS = (1, 2, 3)
DARK = 3.0  # seconds
BACK = 3.0  # seconds


def talking(
    a: str = "port-restricted",
    b: str = "port-restricted",
    *,
    seed: int = 1,
    servers: int = 1,
    loss: float = 0.0,
) -> tuple[SimWorld, SimNode, SimNode]:
    """Return two nodes that have been talking for a while."""
    world = SimWorld(seed, servers=servers, loss=loss)
    alice, bob = world.node("alice", a), world.node("bob", b)
    world.settle(30.0)
    world.run(2.0)
    world.ping(alice, bob, count=100)
    return world, alice, bob


def registered(*nodes: SimNode) -> bool:
    return all(
        client.state.value == "registered" for node in nodes for client in node.mesh.control.clients.values()
    )


def test_killed_rendezvous_costs_established_pairs_nothing_and_is_found_again_in_five_seconds() -> None:
    world, alice, bob = talking()
    world.servers[0].kill()
    assert world.ping(alice, bob, count=300, interval=0.1).lost == []
    assert world.direct(alice, bob)
    world.servers[0].start()
    assert world.wait(lambda: registered(alice, bob), 5.0)


def test_restarted_rendezvous_gives_talking_pairs_a_relay_again() -> None:
    world, alice, bob = talking()
    world.servers[0].kill()
    pings = world.start_pings(alice, bob, count=600, interval=0.05)
    world.run(3.0)
    world.servers[0].start()
    world.run(27.0)
    assert pings.lost == []
    for node, other in ((alice, bob), (bob, alice)):
        assert [path.trusted(world.net.now) or path.last_proof for path in node.peer(other).paths.relays()]


def test_new_pairs_come_up_with_one_of_two_rendezvous_dead() -> None:
    world = SimWorld(servers=2)
    alice, bob = world.node("alice"), world.node("bob")
    world.settle()
    world.run(2.0)
    world.servers[0].kill()
    assert world.ping(alice, bob, count=100).lost == []
    assert world.direct(alice, bob)


def test_pair_on_a_relay_moves_to_another_one_when_it_dies() -> None:
    world, alice, bob = talking("symmetric-random", "symmetric-random", servers=2)
    pings = world.start_pings(alice, bob, count=1500)
    world.run(5.0)
    (used,) = alice.endpoints(bob)
    assert isinstance(used, RelayEndpoint)
    next(server for server in world.servers if server.endpoint == used.server).kill()
    world.run(12.0)
    assert pings.dark <= DARK
    assert relayed(alice.endpoints(bob))
    assert used not in alice.endpoints(bob)


def test_pair_on_a_relay_survives_rendezvous_that_die_in_turn() -> None:
    world, alice, bob = talking("symmetric-random", "symmetric-random", servers=2)
    for turn in range(4):
        world.start_pings(alice, bob, count=1000)
        world.run(8.0 + 0.31 * turn)
        (used,) = alice.endpoints(bob)
        assert isinstance(used, RelayEndpoint)
        server = next(server for server in world.servers if server.endpoint == used.server)
        pings = world.start_pings(alice, bob, count=500)
        server.kill()
        world.run(7.0)
        assert pings.dark <= DARK, turn
        server.start()
        assert world.wait(lambda: registered(alice, bob), 8.0)


def test_pair_on_a_relay_is_back_after_all_rendezvous_were_away() -> None:
    world, alice, bob = talking("symmetric-random", "symmetric-random", servers=2)
    world.start_pings(alice, bob, count=3000)
    world.run(8.0)
    for server in world.servers:
        server.kill()
    world.run(4.0)
    for server in world.servers:
        server.start()
    assert world.wait(lambda: registered(alice, bob), 10.0)
    pings = world.start_pings(alice, bob, count=500)
    world.run(7.0)
    assert pings.dark <= DARK
    assert relayed(alice.endpoints(bob))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rendezvous", [True, False], ids=["rendezvous", "no-rendezvous"])
def test_restarted_daemon_has_its_pairs_back_in_three_seconds(seed: int, rendezvous: bool) -> None:
    world, alice, bob = talking(seed=seed, loss=0.01)
    if not rendezvous:
        world.servers[0].kill()
    pings = world.start_pings(alice, bob, count=1000)
    world.run(2.0)
    bob.kill()
    world.run(1.0)
    started = world.net.now
    bob.start()
    world.run(9.0)
    back = min(pings.answered[number] for number in pings.answered if pings.sent[number] > started)
    assert back - started <= BACK
    assert world.direct(alice, bob)


@pytest.mark.parametrize("away", [0.4, 0.9])
def test_pair_whose_peer_restarts_again_and_again_is_direct_each_time(away: float) -> None:
    world, alice, bob = talking()
    for life in range(10):
        world.start_pings(alice, bob, count=int((away + 2.5) / 0.01))
        bob.kill()
        world.run(away)
        bob.start()
        world.run(2.5)
        assert world.direct(alice, bob), life
    (row,) = alice.mesh.peers(world.net.now)
    assert {path["loss_percent"] for path in row["paths"] if path["kind"] == "direct"} == {0.0}


def test_a_proven_direct_path_that_is_not_used_is_said_to_lose_too_much() -> None:
    world, alice, bob = talking()
    for path in alice.peer(bob).paths.directs():
        for _ in range(64):
            path.rtt.lost()
    world.start_pings(alice, bob, count=1000)
    world.run(8.0)
    (row,) = alice.mesh.peers(world.net.now)
    assert row["path"] == "relay"
    assert row["why_not_direct"].startswith("the relay is better now: the direct path loses ")


def test_both_daemons_restarted_at_once_are_back_in_three_seconds() -> None:
    world, alice, bob = talking()
    alice.kill()
    bob.kill()
    world.run(1.0)
    alice.start()
    bob.start()
    started = world.net.now
    pings = world.ping(alice, bob, count=500)
    assert min(pings.answered.values()) - started <= BACK
    assert world.direct(alice, bob)


def test_nodes_that_start_without_any_rendezvous_meet_where_they_last_did() -> None:
    world, alice, bob = talking()
    world.servers[0].kill()
    alice.kill()
    bob.kill()
    alice.start()
    bob.start()
    assert world.ping(alice, bob, count=300).dark <= BACK
    assert world.direct(alice, bob)


@pytest.mark.parametrize("one_way", [True, False], ids=["one-way", "both-ways"])
def test_direct_path_that_is_blocked_gives_way_to_the_relay_and_comes_back(one_way: bool) -> None:
    world, alice, bob = talking()
    pings = world.start_pings(alice, bob, count=7000)
    world.run(3.0)
    mend = world.net.cut("alice", "bob", one_way=one_way)
    world.run(7.0)
    assert pings.dark <= DARK
    assert relayed(alice.endpoints(bob))
    assert relayed(bob.endpoints(alice))
    mend()
    assert world.wait(lambda: world.direct(alice, bob), 50.0)


@pytest.mark.parametrize("blocked", [("alice", "bob"), ("bob", "alice")])
def test_path_that_works_one_way_only_never_takes_traffic(blocked: tuple[str, str]) -> None:
    world = SimWorld()
    alice, bob = world.node("alice"), world.node("bob")
    world.settle()
    world.run(2.0)
    world.net.cut(*blocked, one_way=True)
    assert world.ping(alice, bob, count=800).lost == []
    for node in (alice, bob):
        changes = [event for event in node.of(ev.PathChanged) if isinstance(event, ev.PathChanged)]
        assert changes
        assert not any(isinstance(to, UdpEndpoint) for event in changes for to in event.new)


@pytest.mark.parametrize("fault", ["flush", "reboot", "readdress", "move"])
@pytest.mark.parametrize("seed", SEEDS)
def test_dark_time_after_the_network_changed_is_three_seconds_at_most(fault: str, seed: int) -> None:
    world, alice, bob = talking(seed=seed, loss=0.005)
    elsewhere = world.router()
    pings = world.start_pings(alice, bob, count=1500)
    world.run(2.0 + 0.23 * seed)
    router = alice.host.above
    assert router is not None
    if fault in ("flush", "reboot"):
        router.reboot()
    elif fault == "readdress":
        router.readdress()
    else:
        alice.move(elsewhere)
    world.run(15.0)
    assert pings.dark <= DARK
    assert world.direct(alice, bob)


def test_default_route_that_moves_is_proven_again_though_addresses_stay() -> None:
    world, alice, bob = talking()
    pings = world.start_pings(alice, bob, count=500)
    world.run(1.0)
    assert alice.host.above is not None
    alice.host.above.readdress()
    alice.mesh.set_host_addresses(alice.host.addresses, world.net.now, moved=True)
    alice.host.wake()
    world.run(6.0)
    assert pings.dark < 0.3
    assert world.direct(alice, bob)


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_clock_that_jumps_costs_nothing(jump: float) -> None:
    world, alice, bob = talking()
    alice.clock.set(alice.clock_offset + jump, True)
    assert world.ping(alice, bob, count=1400, interval=0.1).lost == []
    bob.kill()
    bob.start()
    assert world.ping(alice, bob, count=300).dark <= BACK


@pytest.mark.parametrize("unix", [0.0, TODAY + 365 * 86_400], ids=["1970", "a-year-ahead"])
def test_node_that_boots_at_the_wrong_time_gets_its_peers(unix: float) -> None:
    world = SimWorld()
    alice = world.node("alice")
    world.run(2.0)
    bob = SimNode(world, "bob", 2, world.router().host("bob"))
    world.nodes.append(bob)
    bob.clock_offset = unix - world.net.now
    bob.synchronised = False
    bob.start()
    world.settle()
    world.run(2.0)
    assert world.ping(bob, alice, count=100).lost == []
    bob.kill()
    bob.start()
    assert world.ping(alice, bob, count=300).dark <= BACK
    assert world.direct(alice, bob)


def test_loss_of_five_percent_on_each_link_does_not_move_a_path() -> None:
    world, alice, bob = talking(seed=4, loss=0.05)
    doubtful = 0
    world.start_pings(alice, bob, count=6000, interval=0.02)
    for _ in range(600):
        world.run(0.2)
        doubtful += len(alice.endpoints(bob)) > 1 or relayed(alice.endpoints(bob))
    assert doubtful < 30


def test_twenty_peers_follow_a_node_that_moves() -> None:
    world = SimWorld(seed=5)
    hub = world.node("hub")
    others = [world.node(f"node-{number}") for number in range(20)]
    world.settle(60.0)
    world.run(2.0)
    series = [world.start_pings(hub, other, count=80, interval=0.1) for other in others]
    world.run(3.0)
    assert all(hub.is_direct(other) for other in others)
    hub.move(world.router())
    world.run(7.0)
    assert max(pings.dark for pings in series) <= DARK
    assert all(hub.is_direct(other) for other in others)
