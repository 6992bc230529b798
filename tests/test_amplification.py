"""No datagram of ours makes anybody send more bytes to its source than it had, unless that source showed that
it can be sent to: over all types of CE and WireGuard messages, at a rendezvous and at a node.

    alice, a node ------- internet ------- bob, a member
                             |
                          a stranger, to whom alice's answers go when what bob sealed, or anybody
                          else made up, comes with the stranger's address as its source

Nobody named the stranger's address (what is named has a budget of its own: `test_meshd_budget`), and it
answers nothing, so it never shows that it can be sent to. Everything that reaches it within a minute counts.
What a rendezvous answers to sealed messages is in `test_rendezvous_hostile`; here are the other types.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, ip_network
from random import Random

import pytest

from crossedge.lab.hosts import Transmit
from crossedge.latency.coordinates import Vivaldi
from crossedge.meshd import inner
from crossedge.meshd.constants import MessageType
from crossedge.meshd.keypair import Keypair, seal_transport
from crossedge.meshd.noise import Initiator, PrivateKey
from crossedge.meshd.sequence import tai64n
from crossedge.meshd.staticpeer import StaticPeerSettings
from crossedge.meshd.wireguard import RESPONSE_NOISE, MacMaker, pack_initiation, sender_index
from crossedge.wire import messages as m
from crossedge.wire import stun
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ControlKey, PairKeys, seal
from crossedge.wire.relay import pack_header
from tests.rendezvous_client import Node, World
from tests.simworld import PORT, TODAY, SimWorld, echo

WATCHED = 60.0  # seconds for which what reaches the stranger counts


@dataclass
class Stranger:
    """A host that never agreed to anything."""

    received: list[bytes] = field(default_factory=list)

    def receive(self, datagram: bytes, _source: UdpEndpoint, _now: float) -> None:
        self.received.append(datagram)

    def poll_transmit(self) -> None:
        return None

    def next_deadline(self) -> None:
        return None

    def handle_timeout(self, now: float) -> None:
        pass


class Stage:
    """Alice and bob, who know each other; `up`: with a session and a direct path between them."""

    def __init__(self, *, up: bool, static_peers: tuple[StaticPeerSettings, ...] = ()) -> None:
        self.random = Random(7)
        self.world = SimWorld(seed=7)
        self.alice, self.bob = self.world.node("alice", None), self.world.node("bob", None)
        if static_peers:
            self.alice.host.detach()
            self.alice.static_peers = static_peers
            self.alice.start()
        self.world.settle()
        self.up = up
        if up:
            assert not self.world.ping(self.bob, self.alice, count=100).lost
            assert self.world.direct(self.alice, self.bob)
        self.stranger = Stranger()
        self.host = self.world.net.host("stranger", region="home")
        self.host.attach(self.stranger, port=PORT)
        self.source = UdpEndpoint(self.host.addresses[0], PORT)

    @property
    def seq(self) -> int:
        return int((TODAY + self.world.net.now - 1000.0) * 1e6) + self.random.randrange(1, 10_000_000)

    def sealed(self, message: m.Message, *, by: ControlKey | None = None, padded: bool = True) -> bytes:
        """Seal a control message for alice, by bob's control key if no other is given."""
        pair = PairKeys.derive(by or self.bob.mesh.control.node.key, self.alice.mesh.control.node.key.public)
        plain = m.encode(message) if padded else m.padded(message, 0)
        return seal(plain, pair, self.random.randbytes(24), self.random.choice((None, bytes(16), b"1" * 16)))

    def transport(self, plaintext: bytes, *, pad: bool = False) -> bytes:
        """Seal what bob could say inside the session."""
        session = self.bob.peer(self.alice).session
        assert session is not None
        assert session.current is not None
        return seal_transport(session.current, plaintext, pad=pad)

    def superframes(self, size: int, count: int = 1) -> list[bytes]:
        """Return the datagrams in which bob would send packets of a pod, and send none of them."""
        for number in range(count):
            frame = bytes(10) + echo(0, self.bob.pod, self.alice.pod, 9, number, size)
            self.bob.plane.buffer[: len(frame)] = frame
            self.bob.plane.outbound(len(frame), self.world.net.now)
        self.bob.plane.flush(self.world.net.now)
        taken = [item.datagram for item in self.bob._out]
        self.bob._out.clear()
        return taken

    def initiation(self, *, private: bytes | None = None, mac1: bool = True) -> bytes:
        """Return a fresh handshake initiation, by bob's key if no other is given."""
        remote = self.alice.certificate.x25519
        handshake = Initiator(PrivateKey(private or self.bob.session_key), remote, bytes(32))
        noise = handshake.write(self.random.randbytes(32), tai64n(self.seq + 10_000_000))
        index = self.random.getrandbits(32)
        return MacMaker(remote if mac1 else bytes(32)).finish(pack_initiation(index, noise), 0.0)

    def spoof(self, *datagrams: bytes) -> tuple[int, int]:
        """Let alice receive these from the stranger; return bytes in, and bytes that reached the stranger."""
        world = self.world
        for datagram in datagrams:
            self.alice.receive(datagram, self.source, world.net.now)
            self.alice.host.wake()
        world.run(WATCHED)
        return sum(map(len, datagrams)), sum(map(len, self.stranger.received))

    def check(self, *datagrams: bytes) -> int:
        sent, received = self.spoof(*datagrams)
        kinds = [(datagram[:4].hex(), len(datagram)) for datagram in self.stranger.received]
        assert received <= sent, (received, sent, kinds)
        return received


def control_messages(stage: Stage) -> dict[str, m.Message]:
    """Return one of each type."""
    alice, bob, seq = stage.alice, stage.bob, stage.seq
    record, certificate = bob.mesh.control.own_record(stage.world.net.now), bob.certificate.encode()
    observed = stage.source
    made: list[m.Message] = [
        m.Register(id=1, seq=seq, record=record, certificate=certificate),
        m.Registered(id=1, observed=observed, lease=1, keepalive=1, epoch=1, version=1, unix_time=1),
        m.Keepalive(id=1, seq=seq, epoch=0, version=0),
        m.KeepaliveReply(id=1, observed=observed, epoch=1, version=1, keepalive=1),
        m.Pull(id=1, epoch=0, since=0, window=16),
        m.PullDigests(id=1, first=bytes(16), last=b"\xff" * 16, window=16),
        m.Page(id=1, epoch=1, version=1),
        m.Find(id=1, node=bob.certificate.node_id),
        m.Found(id=1, record=record, certificate=certificate),
        m.Notify(epoch=1, version=1),
        m.Call(id=1, seq=seq, target=alice.certificate.node_id, sealed=b""),
        m.CallReply(id=1, status="ok", channel=1),
        m.Called(
            caller=bob.certificate.node_id,
            caller_seq=seq,
            channel=1,
            observed=observed,
            sealed=stage.sealed(m.CallBody(seq=seq, attempt=1)),
        ),
        m.Bind(id=1, seq=seq, channel=1),
        m.Bound(id=1, channel=1, observed=observed),
        m.Error(id=1, code="x"),
        m.GetBlocklist(id=1),
        m.BlocklistPart(id=1, serial=1, total=1, offset=0, data=b"x"),
        m.Ping(id=1, seq=seq),
        m.Pong(id=1, seq=seq, observed=observed),
        m.CallBody(seq=seq, attempt=1, candidates=(observed,), initiation=stage.initiation()),
    ]
    named = {type(message).__name__: message for message in made}
    assert set(named) == {model.__name__ for model in m.TYPES.values()}
    return named


def inner_messages(stage: Stage) -> dict[str, bytes]:
    """Return the plaintexts of everything that a peer can say inside a session."""
    now = stage.world.net.now
    session = stage.bob.peer(stage.alice).session
    receiver = 0 if session is None or session.current is None else session.current.remote_index
    record, certificate = stage.bob.mesh.control.own_record(now), stage.bob.certificate.encode()
    made: dict[str, inner.Inner] = {
        "Hello": inner.Hello(receiver, False, True, inner.Aeads(3), inner.Gso(7), 1400),
        "Probe, small": inner.Probe(7, now),
        "Probe, full": inner.Probe(8, now, 1232, full_reply=True),
        "Probe, small, full": inner.Probe(9, now, full_reply=True),
        "ProbeReply": inner.ProbeReply(1, now, now, now, 1232, 1232),
        "Statement": inner.Statement(record, certificate),
        "BlocklistAsk": inner.BlocklistAsk(0, 0),
        "BlocklistPart": inner.BlocklistPart(1, 100, 0, b"x" * 20),
        "Place": inner.Place(Vivaldi(bytes).place),
        "Bye": inner.Bye(receiver),
        "Report": inner.Report(receiver, 64, 64),
    }
    assert {type(message) for message in made.values()} == set(inner.Inner.__args__)
    plaintexts = {name: message.encode() for name, message in made.items()}
    # A peer need not keep to the least sizes of our own encoder.
    plaintexts["Probe, short"] = inner._HEADER.pack(inner.PROBE, 0, 16, 10) + bytes(8)
    assert set(plaintexts) == set(INNER)
    return plaintexts


INNER = (
    *("Hello", "Probe, small", "Probe, full", "Probe, small, full", "Probe, short", "ProbeReply"),
    *("Statement", "BlocklistAsk", "BlocklistPart", "Place", "Bye", "Report"),
)
MESSAGES = sorted(model.__name__ for model in m.TYPES.values())
SESSIONS = pytest.mark.parametrize("up", [False, True], ids=["no session", "session"])
SENDERS = pytest.mark.parametrize("sender", ["unknown sender", "member", "rendezvous"])


@SESSIONS
@SENDERS
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "short"])
@pytest.mark.parametrize("name", MESSAGES)
def test_control_message_to_a_node(name: str, padded: bool, sender: str, up: bool) -> None:
    stage = Stage(up=up)
    by = {
        "unknown sender": ControlKey.generate(stage.random.randbytes),
        "member": None,
        "rendezvous": stage.world.servers[0].key,
    }[sender]
    stage.check(stage.sealed(control_messages(stage)[name], by=by, padded=padded))


@SESSIONS
def test_many_pings_to_a_node(up: bool) -> None:
    stage = Stage(up=up)
    pings = [stage.sealed(m.Ping(id=number, seq=stage.seq + number)) for number in range(8)]
    assert stage.check(*pings) > 0


@SESSIONS
def test_called_by_a_rendezvous_that_lies_about_where_the_caller_is(up: bool) -> None:
    """What a stranger costs the one who was called are packets to what the caller itself signed."""
    stage = Stage(up=up)
    bob = stage.bob
    server = stage.world.servers[0]
    body = m.CallBody(seq=stage.seq, attempt=1)
    called = m.Called(
        caller=bob.certificate.node_id,
        caller_seq=1,
        channel=1,
        observed=stage.source,
        sealed=stage.sealed(body),
    )
    stage.alice.receive(stage.sealed(called, by=server.key), server.endpoint, stage.world.net.now)
    stage.alice.host.wake()
    stage.world.run(WATCHED)
    assert not stage.stranger.received


@SESSIONS
@pytest.mark.parametrize("whose", ["member", "stranger", "no mac1"])
def test_handshake_initiation_to_a_node(whose: str, up: bool) -> None:
    stage = Stage(up=up)
    private = stage.random.randbytes(32) if whose == "stranger" else None
    initiation = stage.initiation(private=private, mac1=whose != "no mac1")
    received = stage.check(initiation, initiation, initiation)
    assert (received > 0) == (whose == "member")


@SESSIONS
def test_handshake_initiations_under_load_are_answered_by_cookies(up: bool) -> None:
    stage = Stage(up=up)
    flood = [stage.initiation(private=stage.random.randbytes(32)) for _ in range(230)]
    for datagram in flood:
        stage.alice.receive(datagram, UdpEndpoint("5.200.0.1", 9), stage.world.net.now)
    stage.check(stage.initiation(), stage.initiation(private=stage.random.randbytes(32)))
    assert {datagram[0] for datagram in stage.stranger.received} == {MessageType.COOKIE}


def test_true_handshake_response_from_elsewhere_to_a_node() -> None:
    """Somebody on the way sends bob's genuine response on from another address."""
    stage = Stage(up=False)
    bob = stage.bob
    taken: list[bytes] = []
    poll = bob.poll_transmit

    def without_responses() -> Transmit | None:
        while (item := poll()) is not None and item.datagram[0] == MessageType.RESPONSE:
            taken.append(item.datagram)
        return item

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bob, "poll_transmit", without_responses)
        stage.world.start_pings(stage.alice, bob, count=3)
        stage.world.run(0.2)
    assert taken
    stage.check(taken[-1])
    assert stage.alice.peer(bob).up(stage.world.net.now)


@SESSIONS
def test_forged_handshake_messages_to_a_node(up: bool) -> None:
    stage = Stage(up=up)
    random = stage.random
    stage.check(
        b"\2\0\0\0" + random.randbytes(88),
        b"\3\0\0\0" + random.randbytes(60),
        b"\1\0\0\0" + random.randbytes(144),
    )
    assert not stage.stranger.received


@pytest.mark.parametrize("name", INNER)
def test_in_session_message_from_elsewhere_to_a_node(name: str) -> None:
    stage = Stage(up=True)
    messages = inner_messages(stage)
    stage.check(stage.transport(messages[name]))


def test_keepalive_from_elsewhere_to_a_node() -> None:
    stage = Stage(up=True)
    stage.check(stage.transport(b""))


def test_packet_as_transport_data_from_elsewhere_to_a_node() -> None:
    stage = Stage(up=True)
    stage.check(stage.transport(echo(8, stage.bob.pod, stage.alice.pod, 9, 1, 56), pad=True))


@pytest.mark.parametrize(("size", "count"), [(0, 1), (56, 1), (56, 30), (1300, 1)])
def test_superframes_from_elsewhere_to_a_node(size: int, count: int) -> None:
    stage = Stage(up=True)
    datagrams = stage.superframes(size, count)
    assert all(datagram[:2] == b"\xce\x03" for datagram in datagrams)
    stage.check(*datagrams)


@SESSIONS
def test_relay_envelopes_from_strangers_to_a_node(up: bool) -> None:
    stage = Stage(up=up)
    payloads = [stage.sealed(m.Ping(id=3, seq=stage.seq)), stage.initiation(), b"x" * 40]
    if up:
        payloads += [stage.transport(b""), *stage.superframes(56)]
    stage.check(*(pack_header(number) + payload for number, payload in enumerate(payloads)))
    assert not stage.stranger.received


@SESSIONS
def test_stun_to_a_node_is_never_answered(up: bool) -> None:
    stage = Stage(up=up)
    transaction = stage.random.randbytes(12)
    stage.alice.mesh.begin_netcheck([PORT], stage.world.net.now)
    stage.check(
        stun.encode_request(transaction),
        stun.encode_request(transaction, change_ip=True, change_port=True),
        stun.encode_request(transaction, size=200),
        stun.encode_success(transaction, stage.source),
        stun.encode_error(transaction, 420, (3,)),
    )
    assert not stage.stranger.received


@SESSIONS
def test_garbage_to_a_node(up: bool) -> None:
    stage = Stage(up=up)
    random = stage.random
    heads = (
        b"",
        b"\xce\1\1\0",
        b"\xce\1\2\0",
        b"\xce\2",
        b"\xce\3",
        b"\1\0\0\0",
        b"\2\0\0\0",
        b"\4\0\0\0",
        b"\0\1",
    )
    sizes = (1, 2, 7, 20, 32, 92, 148, 400, 1232)
    templates = [stage.sealed(m.Ping(id=1, seq=stage.seq)), stage.initiation()]
    if up:
        templates += [stage.transport(b"x" * 40), *stage.superframes(56)]
    datagrams = [random.choice(heads) + random.randbytes(random.choice(sizes)) for _ in range(600)]
    for template in templates:
        for _ in range(60):
            flipped = bytearray(template)
            flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
            datagrams += [bytes(flipped), template[: random.randrange(1, len(template))]]
    stage.check(*(datagram for datagram in datagrams if datagram not in templates))


def test_stock_peers_datagrams_from_elsewhere() -> None:
    """Without traffic of ours; with it WireGuard's own rule holds: data goes to where it came from last."""
    private = PrivateKey(Random(3).randbytes(32))
    static = StaticPeerSettings("printer", private.public, (ip_network("10.8.0.0/24"),))
    stage = Stage(up=False, static_peers=(static,))
    remote = stage.alice.certificate.x25519
    handshake = Initiator(private, remote, bytes(32))
    noise = handshake.write(stage.random.randbytes(32), tai64n(stage.seq))
    initiation = MacMaker(remote).finish(pack_initiation(99, noise), 0.0)
    stage.alice.receive(initiation, stage.source, stage.world.net.now)
    stage.alice.host.wake()
    stage.world.run(1.0)
    (response,) = stage.stranger.received
    _, send, receive = handshake.read(response[RESPONSE_NOISE])
    keypair = Keypair(
        local_index=99,
        remote_index=sender_index(response),
        created=stage.world.net.now,
        initiator=True,
        send_key=send,
        receive_key=receive,
    )
    stage.stranger.received.clear()
    packet = echo(0, IPv4Address("10.8.0.1"), stage.alice.pod, 9, 1, 56)
    stage.check(seal_transport(keypair, b""), seal_transport(keypair, packet))
    assert stage.alice.received[-1] == packet


# --- At a rendezvous ------------------------------------------------------------------------------------


def test_rendezvous_answers_nothing_but_control_messages_and_stun() -> None:
    world = World()
    known = Node(world, "known")
    known.register()
    random = world.random
    heads = (
        b"\1\0\0\0",
        b"\2\0\0\0",
        b"\3\0\0\0",
        b"\4\0\0\0",
        b"\xce\1\2\0",
        b"\xce\2",
        b"\xce\3",
        b"\xce\4",
    )
    for source in (known.endpoint, UdpEndpoint("192.0.2.200", 5555)):
        for head in heads:
            for size in (0, 4, 28, 60, 76, 88, 144, 1228):
                world.now += 0.1
                assert world.send(head + random.randbytes(size), source) == []
    assert world.received == []


def test_rendezvous_relays_as_many_bytes_as_came_and_none_back() -> None:
    world = World()
    alice, bob = Node(world, "alice"), Node(world, "bob", UdpEndpoint("203.0.113.9", 9))
    alice.register()
    bob.register()
    channel = alice.call(bob).channel
    world.received.clear()
    datagram = pack_header(channel) + world.random.randbytes(500)
    assert world.send(datagram, alice.endpoint) == []
    assert [(data, to) for data, to, _ in world.received] == [(datagram, bob.endpoint)]


def stun_requests(random: Random) -> list[bytes]:
    transaction = random.randbytes(12)
    made = [stun.encode_request(transaction, size=size) for size in range(20, 204, 4)]
    made += [
        stun.encode_request(transaction, ip, port, size)
        for ip in (False, True)
        for port in (False, True)
        for size in (28, 56, 92)
    ]
    for kind in (0x0006, 0x0026, 0x0027, 0x7FFF, 0x8022):
        for length in (0, 4, 40):
            body = kind.to_bytes(2, "big") + length.to_bytes(2, "big") + random.randbytes(length)
            made.append(b"\0\1" + len(body).to_bytes(2, "big") + b"\x21\x12\xa4\x42" + transaction + body)
    unknown = b"".join(kind.to_bytes(2, "big") + b"\0\0" for kind in range(0x7F00, 0x7F40))
    made.append(b"\0\1" + len(unknown).to_bytes(2, "big") + b"\x21\x12\xa4\x42" + transaction + unknown)
    return made


@pytest.mark.parametrize(
    ("hosts", "source", "most"),
    [
        (("192.0.2.1", "192.0.2.2"), UdpEndpoint("203.0.113.9", 40000), 56),
        (("2001:db8::1", "2001:db8::2"), UdpEndpoint("2001:db8:5::9", 40000), 92),
    ],
    ids=["IPv4", "IPv6"],
)
def test_stun_stays_within_its_stated_exception(
    hosts: tuple[str, ...], source: UdpEndpoint, most: int
) -> None:
    """An answer is never larger than stated, nor than its request but ten times a second for each prefix."""
    world = World(hosts=hosts)
    amplified = 0
    for request in stun_requests(Random(5)) * 4:
        for local in range(4):
            replies = world.send(request, source, local) + [data for data, _, _ in world.received]
            world.received.clear()
            assert len(replies) <= 1
            size = sum(map(len, replies))
            assert size <= most
            amplified += size > len(request)
    assert 0 < amplified <= 10
    for _ in range(50):
        neighbour = UdpEndpoint(source.host.replace(".9", ".77").replace("::9", ":1::77"), 9)
        assert world.send(stun.encode_request(bytes(12), size=20), neighbour) == []
