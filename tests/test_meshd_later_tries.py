"""Tries after the first: what a way from a fresh socket is worth, when they are made, and who pays."""

from __future__ import annotations

import pytest

from crossedge.lab.internet import Conditions
from crossedge.meshd.budget import (
    ADDRESS_BURST,
    ADDRESS_RATE,
    SINGLE_OBSERVER_PACKETS,
    SPRAY_BURST,
    SPRAY_RATE,
)
from crossedge.meshd.candidates import Candidates
from crossedge.meshd.latertries import SPRAY_PROBES, SPRAY_SOCKETS, LaterTries
from crossedge.meshd.liveness import DOUBT_AGAIN
from crossedge.meshd.natplan import PAUSES, Method
from crossedge.meshd.paths import WARM_DIRECT
from crossedge.meshd.peer import ACTIVE_TIME, SESSION_IDLE
from crossedge.meshd.punch import FOLLOWER_EXTRA, Phase
from crossedge.wire.endpoint import SocketEndpoint, UdpEndpoint
from crossedge.wire.record import Candidate, CandidateKind
from tests.natmatrix import Meeting, report
from tests.simworld import PORT, SimNode, SimWorld, relayed
from tests.test_meshd_mesh_hostile import Silent, strangers_host

HARD = ["symmetric-sequential", "symmetric-random"]


def met(a: str, b: str, seed: int = 1) -> tuple[SimWorld, SimNode, SimNode]:
    """Return two nodes whose NATs were measured, and that have talked for ten seconds."""
    meeting = Meeting(a, b, seed, loss=0.0)
    meeting.world.ping(meeting.alice, meeting.bob, count=100, interval=0.1)
    return meeting.world, meeting.alice, meeting.bob


@pytest.mark.parametrize("hard", HARD)
def test_way_from_a_fresh_socket_carries_data_across_rekeys_and_keeps_one_socket(hard: str) -> None:
    world, alice, bob = met(hard, "port-restricted")
    assert world.direct(alice, bob)
    (endpoint,) = alice.endpoints(bob)
    assert isinstance(endpoint, SocketEndpoint)
    assert len(alice.mesh.services.sockets) == 1
    assert len(bob.mesh.services.sockets) == 0
    assert alice.peer(bob).link.superframes
    assert world.ping(bob, alice, count=2600, interval=0.1).lost == []
    assert world.direct(alice, bob)


def test_idle_way_from_a_fresh_socket_is_kept_and_its_socket_closed_with_the_session() -> None:
    world, alice, bob = met("symmetric-random", "linux")
    world.run(ACTIVE_TIME + 60.0)
    assert world.ping(alice, bob, count=20).lost == []
    assert world.direct(alice, bob)
    assert world.wait(lambda: not alice.peer(bob).active, SESSION_IDLE + 5.0)
    assert len(alice.mesh.services.sockets) == 0
    assert len(alice.host._ports) == 1


def test_router_that_forgets_the_way_from_a_fresh_socket_is_punched_again() -> None:
    world, alice, bob = met("symmetric-sequential", "port-restricted")
    pings = world.start_pings(alice, bob, count=600, interval=0.05)
    world.run(2.0)
    assert alice.host.above is not None
    alice.host.above.reboot()
    world.run(28.0)
    assert pings.dark <= 3.0
    assert world.direct(alice, bob)
    assert len(alice.mesh.services.sockets) <= 1 + WARM_DIRECT


def test_pair_comes_back_within_the_longest_pause_after_the_way_was_dead_for_minutes() -> None:
    world, alice, bob = met("port-restricted", "linux")
    mend = world.net.cut("alice", "bob")
    pings = world.start_pings(alice, bob, count=2000, interval=0.2)
    world.run(300.0)
    assert relayed(alice.endpoints(bob))
    mend()
    longest = PAUSES[Method.FRESH][-1] + FOLLOWER_EXTRA
    assert world.wait(lambda: world.direct(alice, bob), longest + 5.0)
    assert pings.dark <= 3.0


def test_peer_that_moves_to_a_better_network_is_punched_at_once() -> None:
    world, alice, bob = met("symmetric-random", "corporate")
    assert alice.peer(bob).punch.phase is bob.peer(alice).punch.phase is Phase.SPENT
    world.start_pings(alice, bob, count=400, interval=0.1)
    bob.move(world.router("full-cone"))
    assert world.wait(lambda: world.direct(alice, bob), DOUBT_AGAIN + 3.0)


def test_verdict_that_comes_late_begins_another_try() -> None:
    meeting = Meeting("symmetric-sequential", "port-restricted", 1, loss=0.0)
    world, alice, bob = meeting.world, meeting.alice, meeting.bob
    verdict = alice.mesh.control.nat.verdict
    alice.mesh.control.nat.set_verdict(type(verdict)(), world.net.now)
    world.run(1.0)
    world.start_pings(alice, bob, count=1200, interval=0.1)
    world.run(10.0)
    assert not world.direct(alice, bob)
    alice.mesh.control.nat.set_verdict(verdict, world.net.now)
    alice.host.wake()
    assert world.wait(lambda: world.direct(alice, bob), DOUBT_AGAIN + 3.0)


def test_hard_nat_that_shows_new_ports_is_not_punched_again_and_again() -> None:
    world, alice, bob = met("symmetric-random", "corporate")
    before = bob.sent_to_peers + alice.sent_to_peers
    pings = world.start_pings(alice, bob, count=600, interval=0.2)
    router = alice.host.above
    assert router is not None
    for number in range(10):
        seen = UdpEndpoint(router.addresses[0], 30_000 + number)
        control = alice.mesh.control
        control.candidates.observe(b"observer", "192.0.2.1", seen)
        control._say(world.net.now)
        alice.host.wake()
        world.run(10.0)
    assert len(pings.answered) > 400
    assert bob.sent_to_peers + alice.sent_to_peers - before < 40


def test_sprays_wait_for_each_others_sockets_and_all_get_through() -> None:
    meeting = Meeting("symmetric-random", "port-restricted", 1, loss=0.0)
    world, alice = meeting.world, meeting.alice
    others = [meeting.bob, *(meeting._node(name, "linux") for name in ("carol", "dave"))]
    world.settle()
    world.run(2.0)
    for other in others:
        world.start_pings(alice, other, count=3000, interval=0.1)
    sockets = 0
    for _ in range(1200):
        world.run(0.1)
        sockets = max(sockets, len(alice.mesh.services.sockets))
    assert SPRAY_SOCKETS <= sockets <= SPRAY_SOCKETS + 128
    direct = [world.direct(alice, other) for other in others]
    spent = [alice.peer(other).punch.phase for other in others]
    assert direct.count(True) >= 2, spent


def test_neighbour_behind_the_same_address_lends_its_verdict() -> None:
    world = SimWorld(observers=1)
    router = world.router("symmetric-sequential")
    alice, carol = world.node("alice", router=router), world.node("carol", router=router)
    bob = world.node("bob", "port-restricted")
    for node, kind in ((carol, "symmetric-sequential"), (bob, "port-restricted")):
        node.mesh.control.nat.report = report(kind)
        node.mesh.control.nat.set_verdict(report(kind).verdict, world.net.now)
        node.host.wake()
    world.settle()
    world.run(3.0)
    assert alice.mesh.services.verdict() == report("symmetric-sequential").verdict
    assert bob.mesh.services.verdict_of(bob.peer(alice)) == report("symmetric-sequential").verdict
    world.ping(alice, bob, count=50, interval=0.1)
    assert world.direct(alice, bob)


def aim(world: SimWorld, alice: SimNode, monkeypatch: pytest.MonkeyPatch) -> Silent:
    """Let a member sign a victim's address, claim two observers, and a NAT that wants a spray."""
    host, victim = strangers_host(world)
    target = UdpEndpoint(host.addresses[0], PORT)
    candidates: Candidates = alice.mesh.control.candidates
    candidates.current = (Candidate(CandidateKind.REFLEXIVE, target),)
    claimed = ((b"first   ", target), (b"second  ", target))
    monkeypatch.setattr(candidates, "observed_by", lambda: claimed)
    alice.mesh.control._say(world.net.now)
    for port in range(1024, 65_536):
        host._ports[port] = host._ports[PORT]
    alice.host.wake()
    return victim


def test_member_alone_cannot_aim_a_spray_at_a_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting("symmetric-random", "port-restricted", 1, loss=0.0)
    world, alice, bob = meeting.world, meeting.alice, meeting.bob
    victim = aim(world, alice, monkeypatch)
    world.run(3.0)
    began = world.net.now
    world.ping(alice, bob, count=1200, interval=0.1)
    assert len(victim.received) <= ADDRESS_BURST + ADDRESS_RATE * (world.net.now - began)
    assert bob.dropped["spray-not-signed"] > 0


def test_member_and_rendezvous_together_can_aim_one_purse_of_a_spray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meeting = Meeting("symmetric-random", "port-restricted", 1, loss=0.0)
    world, alice, bob = meeting.world, meeting.alice, meeting.bob
    victim = aim(world, alice, monkeypatch)
    world.run(3.0)
    began = world.net.now
    pings = world.start_pings(alice, bob, count=12_000, interval=0.1)
    for _ in range(20):
        bob.peer(alice).seen_at = world.net.hosts["victim"].addresses[0]
        for attempt in range(2, 6):
            bob.peer(alice).called(attempt, [], alice.mesh.control.candidates.observed_by(), world.net.now)
            bob.host.wake()
            world.run(5.0)
    seconds = world.net.now - began
    plain = ADDRESS_BURST + ADDRESS_RATE * seconds
    assert SPRAY_PROBES < len(victim.received) <= plain + SPRAY_BURST + SPRAY_RATE * seconds
    assert bob.dropped["budget-spray"] > 0
    assert len(pings.answered) > 1000


def test_server_that_lies_about_fresh_sockets_draws_ten_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting("linux", "linux", 1, loss=0.0)
    world, alice, bob = meeting.world, meeting.alice, meeting.bob
    host, victim = strangers_host(world)
    for port in range(1024, 65_536):
        host._ports[port] = host._ports[PORT]
    world.net.failures.append(lambda packet, target: {packet.origin, target} == {alice.host, bob.host})
    for node in (alice, bob):
        later = node.mesh.members[(bob if node is alice else alice).certificate.node_id].later

        def lied(local: int, _: UdpEndpoint, now: float, later: LaterTries = later) -> None:
            later.scouted(local, UdpEndpoint(host.addresses[0], 2000 + local), now)

        monkeypatch.setattr(node.mesh, "scouted", lied)
    world.ping(alice, bob, count=3000, interval=0.1)
    assert 0 < len(victim.received) <= 2 * SINGLE_OBSERVER_PACKETS, "ten from each side"


def test_single_observer_is_not_enough_for_a_spray() -> None:
    world = SimWorld()
    alice, bob = world.node("alice", "symmetric-random"), world.node("bob", "port-restricted")
    for node, kind in ((alice, "symmetric-random"), (bob, "port-restricted")):
        node.mesh.control.nat.set_verdict(report(kind).verdict, world.net.now)
        node.host.wake()
    world.settle()
    world.run(2.0)
    world.ping(alice, bob, count=100, interval=0.1)
    assert relayed(bob.endpoints(alice))
    assert bob.dropped["spray-single-observer"] > 0
    assert bob.sent_to_peers < 40


def test_lossy_slow_pair_with_two_predictable_nats_meets() -> None:
    meeting = Meeting("symmetric-busy", "symmetric-sequential", 5, loss=0.03)
    world = meeting.world
    for name in ("router0", "router1"):
        world.net.routers[name].link.set(Conditions(delay=0.08, loss=0.03, hops=1))
    assert meeting.run().direct
