"""What strangers, members and rendezvous that lie can do to whole nodes: cost a bounded number of packets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from crossedge.lab.internet import Host, Packet
from crossedge.meshd import client_events as ce
from crossedge.meshd import events as ev
from crossedge.meshd.budget import ADDRESS_BURST, ADDRESS_RATE, SINGLE_OBSERVER_PACKETS
from crossedge.meshd.inner import PROBE_MIN, Statement
from crossedge.meshd.link import Link
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.demux import Kind, classify
from crossedge.wire.endpoint import RelayEndpoint, UdpEndpoint
from crossedge.wire.envelope import ControlKey, PairKeys, seal
from crossedge.wire.identity import network_id
from crossedge.wire.messages import CallBody, Ping, Pong, encode
from crossedge.wire.record import Candidate, CandidateKind
from tests.simworld import PORT, TODAY, SimNode, SimWorld

Pair = tuple[SimWorld, SimNode, SimNode]


class Silent:
    """A host that only counts what reaches it."""

    def __init__(self) -> None:
        self.received: list[tuple[UdpEndpoint, bytes]] = []

    def receive(self, datagram: bytes, source: UdpEndpoint, now: float) -> None:
        self.received.append((source, datagram))

    def poll_transmit(self) -> None:
        return None

    def next_deadline(self) -> None:
        return None

    def handle_timeout(self, now: float) -> None:
        pass


def strangers_host(world: SimWorld, name: str = "victim") -> tuple[Host, Silent]:
    host = world.net.host(name, region="home")
    silent = Silent()
    host.attach(silent, port=PORT)
    return host, silent


def talking(a: str | None = None, b: str | None = None) -> Pair:
    """Return two nodes on the public internet (None), or behind NATs, that talk."""
    world = SimWorld()
    alice, bob = world.node("alice", a), world.node("bob", b)
    world.settle()
    world.run(2.0)
    world.ping(alice, bob, count=50)
    return world, alice, bob


def capture(world: SimWorld, wanted: Callable[[Packet], bool]) -> list[Packet]:
    """Keep what crosses the public internet from now on."""
    seen: list[Packet] = []
    world.net.watchers.append(lambda packet, _: seen.append(packet) if wanted(packet) else None)
    return seen


def inject(world: SimWorld, node: SimNode, datagram: bytes, source: UdpEndpoint) -> None:
    """Let a datagram arrive at a node from any address, as one who spoofs can."""
    node.receive(datagram, source, world.net.now)
    node.host.wake()


def is_control(packet: Packet) -> bool:
    return classify(packet.datagram) is Kind.CONTROL


def test_replayed_ping_is_counted_and_answered_to_nobody() -> None:
    world = SimWorld()
    alice, bob = world.node("alice", None), world.node("bob", None)
    _, victim = strangers_host(world)
    world.settle()
    seen = capture(world, lambda p: is_control(p) and p.origin is alice.host and p.destination[1] == PORT)
    world.ping(alice, bob, count=10)
    pings = [packet.datagram for packet in seen]
    assert pings
    for datagram in pings:
        inject(world, bob, datagram, UdpEndpoint(world.net.hosts["victim"].addresses[0], PORT))
    world.run(5.0)
    assert bob.dropped["replayed-control"] == len(pings)
    assert victim.received == []


def test_ping_caught_on_its_way_and_sent_from_another_address_moves_no_path() -> None:
    world, alice, bob = talking("port-restricted", None)
    host, victim = strangers_host(world)
    source = UdpEndpoint(host.addresses[0], PORT)
    fresh = alice.mesh.control.node.seal(
        Ping(id=7, seq=alice.mesh.control._numbers.next(world.net.now)), bob.mesh.control.node.key.public
    )
    assert fresh is not None
    before = bob.endpoints(alice)
    inject(world, bob, fresh, source)
    world.ping(bob, alice, count=500)
    assert bob.endpoints(alice) == before
    assert not any(isinstance(e, ev.PathChanged) and source in e.new for _, e in bob.events)
    assert 0 < sum(len(datagram) for _, datagram in victim.received) <= len(fresh)


def test_transport_data_caught_on_its_way_and_sent_from_another_address_moves_no_path() -> None:
    world, alice, bob = talking()
    host, victim = strangers_host(world)
    source = UdpEndpoint(host.addresses[0], PORT)
    session = alice.peer(bob).session
    assert session is not None
    assert session.current is not None
    probe = alice.mesh.members[bob.certificate.node_id].talk
    probe.say(Statement(b"").encode(), world.net.now)
    item = alice.mesh.poll_transmit()
    assert item is not None
    inject(world, bob, item.datagram, source)
    world.ping(bob, alice, count=500)
    assert source not in bob.endpoints(alice)
    assert sum(len(datagram) for _, datagram in victim.received) <= len(item.datagram)
    assert all(len(datagram) == PROBE_MIN for _, datagram in victim.received)


def test_reflected_control_message_is_refused() -> None:
    world, alice, bob = talking()
    ping = alice.mesh.control.node.seal(Ping(id=1, seq=1), bob.mesh.control.node.key.public)
    assert ping is not None
    before = alice.dropped["mac1"]
    inject(world, alice, ping, UdpEndpoint(bob.host.addresses[0], PORT))
    assert alice.dropped["mac1"] == before + 1


def test_pong_that_nobody_asked_for_agrees_to_nothing() -> None:
    world, alice, bob = talking()
    host, victim = strangers_host(world)
    control = alice.mesh.control
    pong = control.node.seal(
        Pong(id=99, seq=control._numbers.next(world.net.now), observed=UdpEndpoint("192.0.2.1", 1)),
        bob.mesh.control.node.key.public,
    )
    assert pong is not None
    inject(world, bob, pong, UdpEndpoint(host.addresses[0], PORT))
    world.run(5.0)
    assert bob.dropped["unasked-pong"] == 1
    assert victim.received == []


def test_control_message_of_a_stranger_costs_no_key_agreement_and_gets_no_answer() -> None:
    world, _, bob = talking()
    host, victim = strangers_host(world)
    bob_key = bob.mesh.control.node.key.public
    pairs = len(bob.mesh.control.node._pairs)
    for number in range(100):
        stranger = ControlKey.generate(world.net.random)
        datagram = seal(
            encode(Ping(id=number, seq=number + 1)), PairKeys.derive(stranger, bob_key), world.net.random(24)
        )
        inject(world, bob, datagram, UdpEndpoint(host.addresses[0], PORT))
    assert bob.dropped["unknown-sender"] == 100
    assert len(bob.mesh.control.node._pairs) == pairs
    assert victim.received == []


def lie_about(alice: SimNode, endpoint: UdpEndpoint) -> None:
    """Let the only rendezvous tell a node that it is seen there; the node believes it and signs it."""
    world = alice.world
    client = next(iter(alice.mesh.control.clients.values()))
    client._events.append(ce.Observed(client.server, client.endpoint.host, endpoint))
    alice.mesh.control._client_events(client, world.net.now)
    alice.mesh.handle_timeout(world.net.now)
    alice.host.wake()


def test_address_that_one_lying_rendezvous_made_up_gets_ten_packets() -> None:
    world = SimWorld()
    alice, bob = world.node("alice", "symmetric-random"), world.node("bob", "symmetric-random")
    host, victim = strangers_host(world)
    world.settle()
    lie_about(alice, UdpEndpoint(host.addresses[0], PORT))
    world.run(5.0)
    for _ in range(6):
        world.ping(bob, alice, count=200, interval=0.1)
    assert 0 < len(victim.received) <= SINGLE_OBSERVER_PACKETS
    assert bob.dropped["budget-single-observer"] > 0


def test_endpoint_that_a_rendezvous_claims_to_have_seen_a_caller_at_is_not_tried() -> None:
    world, alice, bob = talking("port-restricted", "port-restricted")
    host, victim = strangers_host(world)
    body = CallBody(seq=alice.mesh.control._numbers.next(world.net.now), attempt=1)
    sealed = alice.mesh.control.node.seal(body, bob.mesh.control.node.key.public)
    assert sealed is not None
    server = next(iter(bob.mesh.control.clients))
    called = ce.Called(
        server, alice.certificate.node_id, 0, 0, UdpEndpoint(host.addresses[0], PORT), sealed, b""
    )
    bob.mesh.control._on_called(called, world.net.now)
    bob.host.wake()
    world.run(5.0)
    assert victim.received == []


def test_member_that_signs_a_victims_address_many_times_is_bound_by_the_address_budget() -> None:
    world = SimWorld()
    alice, bob = world.node("alice", "symmetric-random"), world.node("bob", "symmetric-random")
    host, victim = strangers_host(world)
    world.settle()
    target = [
        Candidate(CandidateKind.STATIC, UdpEndpoint(host.addresses[0], port))
        for port in range(PORT, PORT + 12)
    ]
    for candidate in target[1:]:
        host._ports[candidate.endpoint.port] = host._ports[PORT]
    alice.mesh.control.candidates.current = tuple(target)
    alice.mesh.control._say(world.net.now)
    alice.host.wake()
    world.run(5.0)
    began = world.net.now
    for _ in range(5):
        world.ping(bob, alice, count=100, interval=0.1)
    assert 0 < len(victim.received) <= ADDRESS_BURST + ADDRESS_RATE * (world.net.now - began)
    assert not any(kind is Kind.TRANSPORT for kind in (classify(d) for _, d in victim.received))


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "224.0.0.1", "169.254.1.1", "0.0.0.0", "10.160.2.1", "10.159.0.1"]
)
def test_address_that_nobody_may_be_aimed_at_is_not_tried(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = SimWorld()
    alice, bob = world.node("alice", "symmetric-random"), world.node("bob", "symmetric-random")
    world.settle()
    alice.mesh.control.candidates.current = (Candidate(CandidateKind.STATIC, UdpEndpoint(address, PORT)),)
    alice.mesh.control._say(world.net.now)
    alice.host.wake()
    world.run(5.0)
    sent = Counter[str]()
    original = bob.host._send

    def watch(attachment: Any, item: Any) -> None:
        destination = getattr(item, "destination", None)
        if isinstance(destination, UdpEndpoint):
            sent[destination.host] += 1
        original(attachment, item)

    monkeypatch.setattr(bob.host, "_send", watch)
    world.ping(bob, alice, count=100)
    assert sent[address] == 0
    assert sent


def test_call_with_a_body_that_is_not_the_callers_does_nothing() -> None:
    world, alice, bob = talking()
    stranger = ControlKey.generate(world.net.random)
    key = bob.mesh.control.node.key.public
    sealed = seal(encode(CallBody(seq=1, attempt=1)), PairKeys.derive(stranger, key), world.net.random(24))
    server = next(iter(bob.mesh.control.clients))
    attempt = bob.peer(alice).punch.attempt
    called = ce.Called(server, alice.certificate.node_id, 0, 5, UdpEndpoint("192.0.2.1", 1), sealed, b"")
    bob.mesh.control._on_called(called, world.net.now)
    world.run(5.0)
    assert bob.peer(alice).punch.attempt == attempt
    assert (
        bob.mesh.dropped["unknown-caller"] == 0
    )  # it waits for a record that names that key, and is forgotten
    assert not any(
        isinstance(path.endpoint, RelayEndpoint) and path.endpoint.channel == 5
        for path in bob.peer(alice).paths
    )


def test_replayed_call_does_not_move_the_path() -> None:
    world, alice, bob = talking("port-restricted", "port-restricted")
    control = alice.mesh.control
    body = CallBody(seq=control._numbers.next(world.net.now), attempt=1)
    sealed = control.node.seal(body, bob.mesh.control.node.key.public)
    assert sealed is not None
    server = next(iter(bob.mesh.control.clients))
    before = bob.endpoints(alice)
    for channel in (0, 77, 78):
        called = ce.Called(
            server, alice.certificate.node_id, 0, channel, UdpEndpoint("192.0.2.1", 1), sealed, b""
        )
        bob.mesh.control._on_called(called, world.net.now)
    bob.host.wake()
    world.ping(bob, alice, count=100)
    assert bob.dropped["replayed-control"] == 2
    assert bob.endpoints(alice) == before
    channels = [
        path.endpoint.channel for path in bob.peer(alice).paths if isinstance(path.endpoint, RelayEndpoint)
    ]
    assert not {77, 78} & set(channels)


def test_relay_envelope_of_an_unknown_server_is_refused() -> None:
    world, alice, bob = talking()
    session = alice.peer(bob).session
    assert session is not None
    session.initiate(world.net.now + 10.0)
    assert session.initiation is not None
    inject(world, bob, b"\xce\x02" + bytes(6) + session.initiation, UdpEndpoint("192.0.2.9", 3478))
    assert bob.dropped["unknown-relay"] == 1


def test_record_that_a_peer_hands_on_is_verified_like_any_other() -> None:
    world, alice, bob = talking()
    record = alice.mesh.control.own_record(world.net.now)
    forged = record[:-1] + bytes([record[-1] ^ 1])
    link: Link = bob.peer(alice).link
    known = bob.peer(alice).member.record.seq
    bob.mesh.receive_inner(link, Statement(forged).encode(), bob.endpoints(alice)[0], world.net.now)
    assert bob.peer(alice).member.record.seq == known
    assert sum(bob.mesh.control.directory.dropped.values()) > 0


def test_revoked_member_is_cut_off_though_no_rendezvous_says_so() -> None:
    world = SimWorld()
    alice, bob, carol = (world.node(name) for name in ("alice", "bob", "carol"))
    world.settle()
    world.run(2.0)
    world.ping(alice, bob, count=20)
    world.ping(bob, carol, count=20)
    world.servers[0].kill()
    revoking = Blocklist(
        network=network_id(world.ca.public), serial=2, issued=int(TODAY), revoked={"carol": 4}
    ).sign(world.ca)
    alice.mesh.control.offer_blocklist(revoking.encode(), world.net.now)
    alice._settle()
    alice.host.wake()
    world.run(5.0)
    assert bob.mesh.control.directory.blocklist.serial == 2
    assert bob.of(ev.BlocklistToPersist)
    assert not bob.knows(carol)
    assert len(world.ping(carol, bob, count=20).lost) == 20


def test_large_blocklist_crosses_a_lossy_session_whole() -> None:
    world = SimWorld(seed=3, loss=0.03)
    alice, bob = world.node("alice"), world.node("bob")
    world.settle(30.0)
    world.run(2.0)
    world.ping(alice, bob, count=20)
    world.servers[0].kill()
    revoked = {f"node-{number}": number + 1 for number in range(1500)}
    large = Blocklist(network=network_id(world.ca.public), serial=9, issued=int(TODAY), revoked=revoked).sign(
        world.ca
    )
    assert len(large.encode()) > 16_384
    alice.mesh.control.offer_blocklist(large.encode(), world.net.now)
    alice.host.wake()
    world.run(20.0)
    assert bob.mesh.control.directory.blocklist.serial == 9


def test_every_table_of_a_node_is_bounded_under_a_members_flood() -> None:
    world, alice, bob = talking()
    control = alice.mesh.control
    key = bob.mesh.control.node.key.public
    for number in range(300):
        ping = control.node.seal(Ping(id=number, seq=control._numbers.next(world.net.now)), key)
        assert ping is not None
        inject(world, bob, ping, UdpEndpoint(f"192.0.{number % 4}.{number % 250 + 1}", 1000 + number))
    peer = bob.peer(alice)
    assert len(peer.paths) <= 24
    assert world.ping(bob, alice, count=100).lost == []
    assert bob.endpoints(alice) == (UdpEndpoint(alice.host.addresses[0], PORT),)
