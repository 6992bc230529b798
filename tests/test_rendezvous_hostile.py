"""Strangers get nothing for nothing: no amplification, no X25519, no growth, no way in."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from random import Random

import pytest

from crossedge.rendezvous.settings import SourceLimits
from crossedge.wire import messages as m
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ControlKey, PairKeys, seal
from crossedge.wire.errors import WireError
from crossedge.wire.relay import pack_header
from tests.rendezvous_client import Node, World, only

STRANGER = UdpEndpoint("192.0.2.200", 5555)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Count the X25519 operations."""
    count: list[bytes] = []
    derive = PairKeys.derive

    def counted(own: ControlKey, other: bytes) -> PairKeys:
        count.append(other)
        return derive(own, other)

    monkeypatch.setattr(PairKeys, "derive", counted)
    return count


def all_messages(node: Node, target: Node) -> list[m.Message]:
    """Return one of each type, most of them the smallest there is."""
    record, certificate = node.record.encode(), node.certificate.encode()
    made: list[m.Message] = [
        m.Register(id=1, seq=node.next_seq(), record=record, certificate=certificate),
        m.Register(id=1, seq=node.next_seq(), record=b"", certificate=b""),
        m.Registered(id=1, observed=STRANGER, lease=1, keepalive=1, epoch=1, version=1, unix_time=1),
        m.Keepalive(id=1, seq=node.next_seq(), epoch=0, version=0),
        m.Keepalive(id=1, seq=0, epoch=0, version=0),
        m.KeepaliveReply(id=1, observed=STRANGER, epoch=1, version=1, keepalive=1),
        m.Pull(id=1, epoch=0, since=0, window=16),
        m.PullDigests(id=1, first=bytes(16), last=b"\xff" * 16, window=16),
        m.Page(id=1, epoch=1, version=1),
        m.Find(id=1, node=target.id),
        m.Found(id=1),
        m.Notify(epoch=1, version=1),
        m.Call(id=1, seq=node.next_seq(), target=target.id, sealed=b""),
        m.Call(id=1, seq=0, target=target.id, sealed=b""),
        m.CallReply(id=1, status="ok", channel=1),
        m.Called(caller=node.id, caller_seq=1, channel=1, observed=STRANGER, sealed=b""),
        m.Bind(id=1, seq=node.next_seq(), channel=1),
        m.Bound(id=1, channel=1, observed=STRANGER),
        m.Error(id=1, code="x"),
        m.GetBlocklist(id=1),
        m.BlocklistPart(id=1, serial=1, total=1, offset=0, data=b"x"),
        m.Ping(id=1, seq=1),
        m.Pong(id=1, seq=1, observed=STRANGER),
        m.CallBody(seq=1),
    ]
    assert {type(message) for message in made} == set(m.TYPES.values())
    return made


def sealed_by_hand(node: Node, message: m.Message, cookie: bytes | None) -> bytes:
    """Seal a message without the padding that an honest sender adds."""
    plain = m.padded(message, 0)
    return seal(plain, node.pair, node.world.random.randbytes(24), cookie)


def replies(world: World, datagram: bytes, source: UdpEndpoint) -> int:
    """Return how many bytes a datagram makes the server send to its source."""
    world.now += 1.0
    return sum(len(reply) for reply in world.send(datagram, source))


def test_no_sealed_message_without_valid_cookie_is_answered_with_more_bytes(world: World) -> None:
    known, target = Node(world, "known"), Node(world, "target", UdpEndpoint("198.51.100.9", 9))
    known.register()
    target.register()
    for number in range(20):
        Node(world, f"n{number}", UdpEndpoint("198.51.100.9", 1000 + number)).register()
    world.service.set_blocklist(world.blocklist(1, {f"gone{number}": 1 for number in range(200)}), world.now)
    stranger = Node(world, "stranger", STRANGER)
    old_cookie = known.cookie
    world.now += 1000  # Cookies do not live that long; that lease does, as no timeout is handled here.
    cookies = (None, bytes(16), b"\1" * 16, old_cookie)
    for node, sources in ((stranger, [STRANGER]), (known, [known.endpoint, STRANGER])):
        for message in all_messages(node, target):
            for cookie in cookies:
                for source in sources:
                    for datagram in (
                        sealed_by_hand(node, message, cookie),
                        seal(m.encode(message), node.pair, world.random.randbytes(24), cookie),
                    ):
                        sent = replies(world, datagram, source)
                        assert sent <= len(datagram), (type(message).__name__, source, sent, len(datagram))
        assert world.service.drops()["transmit-queue"] == 0


def test_short_requests_of_a_known_node_are_never_answered_with_more_bytes(world: World) -> None:
    node = Node(world, "known")
    node.register()
    for message in all_messages(node, node):
        datagram = sealed_by_hand(node, message, None)
        assert replies(world, datagram, node.endpoint) <= len(datagram)


def garbage(random: Random, templates: list[bytes]) -> Iterator[bytes]:
    """Yield datagrams that are nearly messages."""
    heads = [
        b"",
        b"\xce\x01\x01\x00",
        b"\xce\x01\x02\x00",
        b"\xce\x02",
        b"\xce\x03",
        b"\1\0\0\0",
        b"\4\0\0\0",
    ]
    for _ in range(1500):
        yield random.choice(heads) + random.randbytes(random.choice((0, 1, 7, 20, 100, 148, 400, 1232)))
    for template in templates:
        for _ in range(60):
            flipped = bytearray(template)
            flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
            yield bytes(flipped)
            yield template[: random.randrange(len(template))]
            yield template + random.randbytes(random.randrange(1, 50))


def test_no_garbage_is_answered_with_more_bytes(world: World) -> None:
    known = Node(world, "known")
    known.register()
    channel = pack_header(12345) + b"x" * 20
    templates = [known.seal(message) for message in all_messages(known, known)[:6]] + [channel]
    sent = 0
    for datagram in garbage(world.random, templates):
        size = replies(world, datagram, STRANGER)
        assert size <= len(datagram)
        sent += size
    assert world.service.registry.leases.keys() == {known.control.public}
    drops = world.service.drops()
    assert drops["bad-mac1"] > 100
    assert drops["truncated"] > 100


def test_relay_answers_strangers_with_nothing(world: World) -> None:
    alice = Node(world, "alice")
    bob = Node(world, "bob", UdpEndpoint("203.0.113.9", 9))
    alice.register()
    bob.register()
    channel = alice.call(bob).channel
    world.received.clear()
    for number in (channel, channel ^ 1, 0):
        assert world.send(pack_header(number) + bytes(1000), STRANGER) == []
    assert world.received == []


def test_flood_with_fresh_keys_costs_no_x25519_and_keepalives_still_answer(
    world: World, derived: list[bytes]
) -> None:
    node = Node(world, "honest")
    node.register()
    derived.clear()
    random = Random(9)
    template = bytearray(node.seal(m.Keepalive(id=1, seq=1, epoch=0, version=0)))
    for number in range(2000):
        # A fresh key without its private half: mac1 needs the server's public key alone.
        fresh = PairKeys(random.randbytes(32), world.key.public, random.randbytes(32), bytes(32))
        cookie = random.choice((None, random.randbytes(16)))
        datagram = seal(bytes(template[:96]), fresh, random.randbytes(24), cookie)
        world.service.receive(datagram, UdpEndpoint(f"198.18.{number % 200}.1", 7), 0, world.now)
        while world.service.poll_transmit():
            pass
        if number % 100 == 0:
            assert isinstance(only(node.keepalive(), m.KeepaliveReply), m.KeepaliveReply)
    assert derived == []


def test_sender_with_a_cookie_is_held_to_the_rate_of_strangers(world: World, derived: list[bytes]) -> None:
    world = World(limits=SourceLimits(stranger_rate=5))
    for _ in range(40):
        node = Node(world, "n", STRANGER)
        node.ask(m.Keepalive(id=1, seq=1, epoch=0, version=0), source=STRANGER)
    server_side = [key for key in derived if key != world.key.public]
    assert len(server_side) == 10
    assert world.service.drops()["stranger-rate"] == 30


def test_cookies_have_a_rate_per_prefix() -> None:
    world = World(limits=SourceLimits(cookie_rate=20))
    node = Node(world, "n", STRANGER)
    datagram = node.seal(m.Keepalive(id=1, seq=1, epoch=0, version=0))
    assert sum(len(world.send(datagram, STRANGER)) for _ in range(100)) == 20
    assert len(world.send(datagram, UdpEndpoint("203.0.113.1", 1))) == 1


def test_node_that_floods_is_held_to_its_rate_and_others_are_not() -> None:
    world = World(limits=SourceLimits(node_rate=10))
    loud, quiet = Node(world, "loud"), Node(world, "quiet", STRANGER)
    loud.register()
    quiet.register()
    world.now += 10
    assert sum(len(loud.keepalive()) for _ in range(100)) == 20
    assert world.service.drops()["node-rate"] == 80
    assert len(quiet.keepalive()) == 1


def test_replay_from_elsewhere_does_not_spend_the_nodes_rate() -> None:
    world = World(limits=SourceLimits(node_rate=10))
    node = Node(world, "victim")
    node.register()
    world.now += 10
    captured = node.seal(m.Pull(id=1, epoch=0, since=0))
    for _ in range(200):
        world.send(captured, STRANGER)
    assert len(node.keepalive()) == 1
    assert world.service.drops()["node-rate"] == 0


def test_low_order_control_key_is_dropped_by_name(world: World) -> None:
    node = Node(world, "n", STRANGER)
    zero = PairKeys(bytes(32), world.key.public, bytes(32), bytes(32))
    plain = m.encode(m.Keepalive(id=1, seq=1, epoch=0, version=0))
    (reply,) = world.send(seal(plain, zero, bytes(24)), STRANGER)
    node.take(reply)
    assert world.send(seal(plain, zero, bytes(24), node.cookie), STRANGER) == []
    assert world.service.drops()["weak-key"] == 1


def test_reflected_answer_is_not_taken_for_a_message(world: World) -> None:
    node = Node(world, "n")
    node.register()
    (reply,) = world.send(
        node.seal(m.Keepalive(id=1, seq=node.next_seq(), epoch=0, version=0)), node.endpoint
    )
    assert world.send(reply, node.endpoint) == []
    assert world.service.drops()["bad-mac1"] == 1


def test_datagram_from_port_0_is_dropped(world: World) -> None:
    node = Node(world, "n")
    assert world.send(node.seal(node.registration()), UdpEndpoint("192.0.2.1", 0)) == []
    assert world.service.drops()["bad-source"] == 1


def test_hostile_traffic_does_not_make_the_server_grow() -> None:
    world = World(limits=SourceLimits(slots=256))
    random = Random(4)
    world.received = []
    plain = m.encode(m.Keepalive(id=1, seq=1, epoch=0, version=0))

    def flood(count: int) -> None:
        for _ in range(count):
            source = UdpEndpoint(f"{random.randrange(1, 224)}.{random.randrange(256)}.7.9", 99)
            fresh = PairKeys(random.randbytes(32), world.key.public, random.randbytes(32), bytes(32))
            for datagram in (
                seal(plain, fresh, random.randbytes(24)),
                b"\0\1\0\0\x21\x12\xa4\x42" + random.randbytes(12),
                pack_header(random.getrandbits(48)) + b"x",
                random.randbytes(40),
            ):
                world.service.receive(datagram, source, 0, world.now)
            while world.service.poll_transmit():
                pass

    flood(300)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        flood(1000)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 20_000


def test_transmit_queue_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossedge.rendezvous.door.TRANSMIT_QUEUE", 10)
    node = Node(world, "n", STRANGER)
    datagram = node.seal(m.Keepalive(id=1, seq=1, epoch=0, version=0))
    for _ in range(30):
        world.service.receive(datagram, STRANGER, 0, world.now)
    assert len(world.collect(STRANGER)) == 10
    assert world.service.drops()["transmit-queue"] == 20


def test_only_wire_errors_come_out_of_statements(world: World) -> None:
    random = Random(12)
    node = Node(world, "n")
    certificate, record = node.certificate.encode(), node.record.encode()
    for _ in range(300):
        bad = bytearray(random.choice((certificate, record)))
        for _ in range(random.randrange(1, 4)):
            bad[random.randrange(len(bad))] = random.randrange(256)
        message = m.Register(
            id=1,
            seq=node.next_seq(),
            record=bytes(bad) if random.random() < 0.5 else record,
            certificate=bytes(bad)[:499] if random.random() < 0.5 else certificate,
        )
        world.now += 0.1
        try:
            node.ask(message)
        except WireError as error:  # a golden rule broken would be any other exception
            pytest.fail(str(error))


def test_an_empty_datagram_is_dropped_and_counted(world: World) -> None:
    assert world.service.receive_train(memoryview(b""), 0, STRANGER, 0, world.now) == []
    assert world.service.drops()["unknown-kind"] == 1
    assert world.service.poll_transmit() is None
