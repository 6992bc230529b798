"""Whole nodes that meet: relay first, direct after proof, through every NAT that can be punched.

alice --LAN-- router --WAN--+-- rendezvous
                            +-- router --LAN-- bob
"""

from __future__ import annotations

from statistics import median

import pytest

from crossedge.lab.internet import Conditions
from crossedge.meshd import events as ev
from crossedge.meshd.constants import TRANSPORT_OVERHEAD
from crossedge.meshd.link import SAFE_DATAGRAM
from crossedge.meshd.path import State
from crossedge.meshd.peer import ACTIVE_TIME, SESSION_IDLE
from crossedge.meshd.staticpeer import StaticPeerSettings
from crossedge.wire.endpoint import RelayEndpoint, UdpEndpoint
from tests.simworld import PORT, SimNode, SimWorld, relayed

PUNCHABLE = [
    ("full-cone", "full-cone"),
    ("full-cone", "symmetric-random"),
    ("restricted-cone", "symmetric-random"),
    ("restricted-cone", "port-restricted"),
    ("port-restricted", "port-restricted"),
    ("port-restricted", "linux"),
    ("linux", "linux"),
    (None, "port-restricted"),
    (None, "symmetric-random"),
    (None, None),
]
"""Where simultaneous punching works by RFC 4787's terms, without a guess at ports."""

HARD = [("symmetric-random", "symmetric-random"), ("symmetric-random", "port-restricted")]


def pair(
    a: str | None = "port-restricted", b: str | None = "port-restricted", *, seed: int = 1, loss: float = 0.0
) -> tuple[SimWorld, SimNode, SimNode]:
    world = SimWorld(seed, loss=loss)
    alice, bob = world.node("alice", a), world.node("bob", b)
    world.settle(30.0)
    world.run(2.0)
    return world, alice, bob


@pytest.mark.parametrize(("a", "b"), PUNCHABLE)
def test_no_ping_is_lost_from_the_first_packet_until_the_path_is_direct(a: str | None, b: str | None) -> None:
    world, alice, bob = pair(a, b)
    pings = world.ping(alice, bob, count=100, interval=0.01)
    assert pings.lost == []
    assert pings.copies == 0
    assert world.direct(alice, bob)


def test_first_packet_goes_through_the_relay_and_data_moves_once_to_the_direct_path() -> None:
    world, alice, bob = pair()
    world.ping(alice, bob, count=100, interval=0.01)
    moves = [event.new for event in alice.of(ev.PathChanged) if isinstance(event, ev.PathChanged)]
    assert [len(new) for new in moves] == [1, 1]
    assert isinstance(moves[0][0], RelayEndpoint)
    assert isinstance(moves[1][0], UdpEndpoint)


@pytest.mark.parametrize(("a", "b"), [("port-restricted", "port-restricted"), ("linux", "restricted-cone")])
def test_median_time_to_direct_is_two_round_trips_and_100_ms_with_loss_on_each_link(a: str, b: str) -> None:
    excess = []
    for seed in range(1, 12):
        world, alice, bob = pair(a, b, seed=seed, loss=0.05)
        world.ping(alice, bob, count=200, interval=0.01)
        assert world.direct(alice, bob)
        times = [alice.peer(bob).time_to_direct, bob.peer(alice).time_to_direct]
        rtt = alice.peer(bob).paths.current
        assert rtt is not None
        minimum = rtt.rtt.minimum(world.net.now)
        assert minimum is not None
        excess.append(max(time for time in times if time is not None) - 2 * minimum)
    assert median(excess) <= 0.100


@pytest.mark.parametrize(("a", "b"), HARD)
def test_pair_that_cannot_be_punched_stays_on_the_relay_and_says_why(a: str, b: str) -> None:
    world, alice, bob = pair(a, b)
    pings = world.ping(alice, bob, count=600, interval=0.01)
    assert pings.lost == []
    assert relayed(alice.endpoints(bob))
    assert relayed(bob.endpoints(alice))
    row = alice.mesh.peers(world.net.now)[0]
    assert row["path"] == "relay"
    assert row["why_not_direct"]


def test_pair_that_cannot_be_punched_gets_few_packets() -> None:
    world, alice, bob = pair(*HARD[0])
    world.ping(alice, bob, count=3000, interval=0.01)
    assert alice.mesh.control.sent["ping"] + bob.mesh.control.sent["ping"] < 40


def test_both_may_call_at_once() -> None:
    world, alice, bob = pair()
    there = world.start_pings(alice, bob, count=100)
    back = world.start_pings(bob, alice, count=100)
    world.run(3.0)
    assert there.lost == back.lost == []
    assert world.direct(alice, bob)


def test_two_nodes_on_one_lan_meet_there() -> None:
    world = SimWorld()
    router = world.router()
    alice, bob = world.node("alice", router=router), world.node("bob", router=router)
    world.settle()
    assert world.ping(alice, bob, count=100).lost == []
    (endpoint,) = alice.endpoints(bob)
    assert endpoint == bob.host.endpoint(PORT)
    seconds = alice.peer(bob).time_to_direct
    assert seconds is not None
    assert seconds < 0.05


def test_node_behind_two_nats_reaches_everyone() -> None:
    world = SimWorld()
    outer = world.router()
    inner = outer.router("inner")
    deep, between, far = (
        world.node("deep", router=inner),
        world.node("between", router=outer),
        world.node("far"),
    )
    world.settle()
    world.run(2.0)
    for other in (between, far):
        assert world.ping(deep, other, count=100).lost == []
    assert world.direct(deep, between)
    assert world.direct(deep, far)


def test_two_lans_with_the_same_prefix_do_not_meet_a_stranger() -> None:
    world = SimWorld()
    alice = world.node("alice", router=world.router(lan="192.168.1"))
    bob = world.node("bob", router=world.router(lan="192.168.1"))
    world.settle()
    world.run(2.0)
    assert alice.host.addresses == bob.host.addresses
    assert world.ping(alice, bob, count=100).lost == []
    assert world.direct(alice, bob)


def test_six_nodes_behind_different_nats_all_meet() -> None:
    world = SimWorld(seed=3, loss=0.01)
    kinds = ["full-cone", "restricted-cone", "port-restricted", "linux", "hairpinning", None]
    nodes = [world.node(f"node-{number}", kind) for number, kind in enumerate(kinds)]
    world.settle(30.0)
    world.run(2.0)
    pairs = [(a, b) for number, a in enumerate(nodes) for b in nodes[number + 1 :]]
    series = [world.start_pings(a, b, count=100, interval=0.05) for a, b in pairs]
    world.run(8.0)
    assert all(len(pings.lost) < 20 for pings in series)
    assert world.direct(*nodes)


def test_superframes_carry_the_data_of_every_session() -> None:
    world, alice, bob = pair()
    world.ping(alice, bob, count=20)
    assert alice.peer(bob).link.superframes
    assert bob.peer(alice).link.superframes


@pytest.mark.parametrize("leads", [True, False])
def test_sides_that_send_with_different_keypairs_come_to_one_and_to_superframes(leads: bool) -> None:
    """Handshakes that crossed and overtook each other can end so; here one side is put back by hand."""
    world, alice, bob = pair()
    world.ping(alice, bob, count=20)
    alice.mesh.want_session(alice.peer(bob).link, world.net.now)
    sessions = [node.peer(other).session for node, other in ((alice, bob), (bob, alice))]
    assert sessions[0] is not None
    sessions[0].initiate(world.net.now)
    alice.host.wake()
    world.ping(alice, bob, count=20)
    stray = next(session for session in sessions if session is not None and session.leads is leads)
    node, other = (alice, bob) if stray is sessions[0] else (bob, alice)
    assert stray.previous is not None
    stray.current, stray.previous = stray.previous, stray.current
    node.peer(other).talk.begin(stray.current, world.net.now, state=False)
    for each in (alice, bob):
        each.peer(bob if each is alice else alice).link.datagram_size = 600
    series = [world.start_pings(*ends, count=100, size=1352) for ends in ((alice, bob), (bob, alice))]
    world.run(3.0)
    assert alice.peer(bob).link.superframes
    assert bob.peer(alice).link.superframes
    assert [pings.lost for pings in series] == [[], []]


def test_what_comes_through_the_relay_in_pieces_is_taken_by_an_end_that_sends_direct() -> None:
    world, alice, bob = pair()
    world.ping(alice, bob, count=50)
    assert world.direct(alice, bob)
    relay = alice.peer(bob).paths.relays()[0].endpoint
    alice.peer(bob).link.set_path((relay,), 600)
    large = world.start_pings(alice, bob, count=1, size=1352)
    assert alice.endpoints(bob) == (relay,)
    world.run(1.0)
    assert large.lost == []
    assert not bob.dropped["chunk-source"]


def test_rekeys_under_traffic_lose_nothing() -> None:
    world, alice, bob = pair()
    pings = world.ping(alice, bob, count=2600, interval=0.1)
    assert pings.lost == []
    assert len(alice.of(ev.SessionChanged)) == 1
    assert alice.peer(bob).link.superframes


@pytest.mark.parametrize(("mtu", "size"), [(1280, 1252), (1492, 1464), (1500, 1472)])
def test_datagrams_take_the_size_that_the_path_has(mtu: int, size: int) -> None:
    world = SimWorld()
    world.link = Conditions(delay=0.006, mtu=mtu)
    alice, bob = world.node("alice"), world.node("bob")
    world.settle()
    world.run(2.0)
    world.ping(alice, bob, count=200)
    assert alice.peer(bob).link.datagram_size == size
    large = world.start_pings(alice, bob, count=50, interval=0.02, size=1352)
    world.run(3.0)
    assert large.lost == []


def test_path_that_shrinks_is_noticed_within_three_seconds() -> None:
    world, alice, bob = pair()
    world.ping(alice, bob, count=300)
    large = world.start_pings(alice, bob, count=1500, interval=0.01, size=1352)
    world.run(2.0)
    assert alice.host.above is not None
    alice.host.above.link.set(Conditions(delay=0.006, mtu=1400))
    world.run(15.0)
    assert large.dark <= 3.0
    assert alice.peer(bob).link.datagram_size == 1400 - 28


def test_idle_pair_keeps_its_path_with_few_packets_and_starts_without_loss() -> None:
    world, alice, bob = pair()
    world.ping(alice, bob, count=50)
    world.run(ACTIVE_TIME + 5.0)
    before = alice.host.counters["sent"]
    world.run(60.0)
    assert alice.host.counters["sent"] - before < 40
    assert {path.state for path in alice.peer(bob).paths if path.last_proof} == {State.PROVEN}
    assert world.ping(alice, bob, count=50).lost == []
    assert world.direct(alice, bob)


def test_idle_session_is_closed_and_the_next_packet_opens_it() -> None:
    world, alice, bob = pair()
    world.ping(alice, bob, count=10)
    world.run(SESSION_IDLE + 10.0)  # before somebody looks whether anybody can be reached at all
    assert not alice.peer(bob).active
    assert not bob.peer(alice).active
    assert alice.mesh.device.indices == {}
    assert world.ping(alice, bob, count=50).lost == []
    assert world.direct(alice, bob)


def test_nodes_without_traffic_have_no_sessions_but_what_shows_that_they_can_be_reached() -> None:
    world = SimWorld()
    nodes = [world.node(f"node-{number}") for number in range(12)]
    world.settle()

    def sessions() -> int:
        return sum(peer.active for node in nodes for peer in node.mesh.members.values()) // 2

    world.run(20.0)
    assert sessions() == 0
    most = 0
    for _ in range(10):
        world.run(60.0)
        most = max(most, sessions())
    assert 0 < most <= len(nodes)  # each looks for one


def test_person_may_ping_a_cold_peer() -> None:
    world, alice, _ = pair()
    assert alice.mesh.ping("bob", 7, world.net.now)
    alice._settle()
    alice.host.wake()
    world.run(3.0)
    (result,) = alice.of(ev.PingResult)
    assert isinstance(result, ev.PingResult)
    assert (result.number, result.note) == (7, "")
    assert result.rtt is not None
    assert 0.02 < result.rtt < 0.2
    assert not alice.mesh.ping("nobody", 8, world.net.now)


def test_person_who_pings_a_dead_peer_is_told() -> None:
    world, alice, bob = pair()
    bob.kill()
    alice.mesh.ping("bob", 1, world.net.now)
    alice.host.wake()
    world.run(8.0)
    (result,) = alice.of(ev.PingResult)
    assert isinstance(result, ev.PingResult)
    assert result.rtt is None
    assert result.note == "no session"


def test_snapshots_say_what_is_there() -> None:
    world, alice, bob = pair()
    world.ping(alice, bob, count=50)
    now = world.net.now
    (row,) = alice.mesh.peers(now)
    assert (row["name"], row["state"], row["path"], row["why_not_direct"]) == ("bob", "up", "direct", None)
    assert row["rtt_ms"] == pytest.approx(26.8, abs=1.0)
    assert row["time_to_direct_ms"] > 0
    status = alice.mesh.status(now)
    assert status["peers"] == {"known": 1, "direct": 1, "relay": 0}
    assert [server["state"] for server in status["rendezvous"]] == ["registered"]
    routes = alice.mesh.routes()
    assert {str(route.prefix) for route in routes} == {str(prefix) for prefix in bob.certificate.allowed_ips}


def stock_pair(*, known: bool = True) -> tuple[SimWorld, SimNode, SimNode]:
    """Two nodes that know each other as stock peers; only alice knows where bob is, if anybody does."""
    world = SimWorld()
    alice = SimNode(world, "alice", 1, world.router("full-cone").host("alice"))
    bob = SimNode(world, "bob", 2, world.net.host("bob", region="cloud"))
    world.nodes = [alice, bob]
    alice.static_peers = (
        StaticPeerSettings(
            "bob",
            bob.certificate.x25519,
            bob.certificate.allowed_ips,
            UdpEndpoint(bob.host.addresses[0], PORT) if known else None,
        ),
    )
    bob.static_peers = (StaticPeerSettings("alice", alice.certificate.x25519, alice.certificate.allowed_ips),)
    alice.start(rendezvous=False)
    bob.start(rendezvous=False)
    return world, alice, bob


def test_stock_peers_talk_across_rekeys() -> None:
    world, alice, bob = stock_pair()
    assert world.ping(alice, bob, count=2600, interval=0.1).lost == []
    assert bob.mesh.peers(world.net.now)[0]["path"] == "direct"
    assert not any(peer.superframes for peer in (alice.mesh.static[bob.certificate.x25519].link,))


def test_stock_peer_is_followed_to_where_it_roams() -> None:
    world, alice, bob = stock_pair()
    pings = world.start_pings(alice, bob, count=500)
    world.run(2.0)
    alice.move(world.router("port-restricted"))
    world.run(4.0)
    assert pings.dark < 0.2
    (static,) = bob.mesh.static.values()
    assert alice.host.above is not None
    assert static.endpoint == UdpEndpoint(alice.host.above.addresses[0], PORT)


def test_stock_peer_whose_name_resolves_late_gets_what_waited_for_it() -> None:
    world, alice, bob = stock_pair(known=False)
    pings = world.start_pings(alice, bob, count=50)
    world.run(0.3)
    assert not pings.answered
    alice.mesh.set_static_endpoint("bob", UdpEndpoint(bob.host.addresses[0], PORT), world.net.now)
    alice.host.wake()
    world.run(2.0)
    assert pings.lost == []
    alice.mesh.set_static_endpoint("bob", UdpEndpoint("192.0.2.1", PORT), world.net.now)
    (static,) = alice.mesh.static.values()
    assert static.endpoint == UdpEndpoint(bob.host.addresses[0], PORT), "it speaks from there"


def test_stock_peers_routes_are_asked_for_at_the_start_and_again_with_their_mtu() -> None:
    world, alice, bob = stock_pair()
    bob.readdressed()  # so that it tells what happened
    assert len(bob.of(ev.RoutesChanged)) == 1
    assert {route.mtu for route in bob.mesh.routes()} == {SAFE_DATAGRAM - TRANSPORT_OVERHEAD}
    world.ping(alice, bob, count=3)
    assert len(bob.of(ev.RoutesChanged)) == 2
    assert {route.mtu for route in bob.mesh.routes()} == {1500 - 28 - TRANSPORT_OVERHEAD}


def test_stock_peer_gets_the_mtu_of_its_underlay() -> None:
    world, alice, _ = stock_pair()
    assert {route.mtu for route in alice.mesh.routes() if route.stock} == {1472 - 32}
    alice.mesh.set_underlay_mtu(1400, world.net.now)
    assert {route.mtu for route in alice.mesh.routes() if route.stock} == {1372 - 32}
    assert any(isinstance(event, ev.RoutesChanged) for event in iter(alice.mesh.poll_event, None))


def test_in_session_messages_of_a_stock_peer_are_refused() -> None:
    world, alice, bob = stock_pair()
    world.ping(alice, bob, count=5)
    (static,) = alice.mesh.static.values()
    alice.mesh.receive_inner(static.link, bytes(16), bob.host.endpoint(PORT), world.net.now)
    assert alice.dropped["inner-of-stock-peer"] == 1


def test_session_that_one_side_forgot_is_forgotten_by_the_other_too() -> None:
    world, alice, bob = pair()
    world.ping(alice, bob, count=10)
    world.run(SESSION_IDLE - 20.0)
    bob.kill()
    bob.start()  # it reopens the session that it had, and counts its idle time from now
    assert world.wait(lambda: not alice.peer(bob).active and not bob.peer(alice).active, 40.0)
    assert world.ping(bob, alice, count=50).lost == []


def test_log_hears_of_a_path_when_it_changes_and_not_when_a_pair_rests() -> None:
    world, alice, bob = pair()
    world.ping(alice, bob, count=50)
    before = len(alice.of(ev.PathChanged))
    for _ in range(3):
        world.run(ACTIVE_TIME + 10.0)
        world.ping(alice, bob, count=5)
    assert len(alice.of(ev.PathChanged)) - before <= 6
