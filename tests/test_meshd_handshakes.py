"""The door for handshake messages: what strangers can and cannot make us do."""

from __future__ import annotations

import random

import pytest

from crossedge.meshd.constants import (
    COOKIE_SIZE,
    INITIATION_SIZE,
    LOAD_BURST,
    RESPONSE_SIZE,
    SOURCE_BURST,
    SOURCES_MAX,
)
from crossedge.meshd.device import Device
from crossedge.meshd.handshakes import Handshakes, SourceLimits
from crossedge.meshd.keypair import seal_transport
from crossedge.meshd.noise import PrivateKey
from crossedge.meshd.session import Session
from crossedge.meshd.wireguard import MacMaker, pack_initiation, pack_response
from crossedge.wire.endpoint import Endpoint, RelayEndpoint, UdpEndpoint
from tests.session_pair import KEYS, Pair, data

HOME = UdpEndpoint("198.51.100.7", 41820)
SOURCES: list[Endpoint] = [
    HOME,
    UdpEndpoint("2001:db8::7", 41820),
    RelayEndpoint(UdpEndpoint("203.0.113.1", 3478), 2**48 - 1),
]


class Server:
    """A device that knows one peer, and counts how often it looks a peer up (after the first X25519)."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lookups = 0
        self.device = Device(KEYS[1], random.Random(1).randbytes, lambda now: bytes(12))
        self.session = Session(self.device, KEYS[0].public, now=self.now)
        self.handshakes = Handshakes(self.device, self.lookup)

    def lookup(self, key: bytes) -> Session | None:
        self.lookups += 1
        return self.session if key == KEYS[0].public else None

    def receive(self, datagram: bytes, source: Endpoint = HOME) -> list[tuple[bytes, Endpoint]]:
        self.handshakes.receive(datagram, source, self.now)
        replies = []
        while (reply := self.handshakes.poll_transmit()) is not None:
            replies.append(reply)
        return replies

    @property
    def dropped(self) -> dict[str, int]:
        return dict(self.handshakes.dropped)

    def load(self) -> None:
        """Come under load by a flood of messages with a good mac1 from elsewhere."""
        macs = MacMaker(KEYS[1].public)
        for number in range(int(LOAD_BURST) + 1):
            flood = macs.finish(pack_initiation(number, bytes(108)), 0.0)
            self.handshakes.receive(flood, UdpEndpoint("192.0.2.66", 666), self.now)
        while self.handshakes.poll_transmit() is not None:
            pass
        assert self.handshakes.under_load(self.now)
        self.handshakes.dropped.clear()
        self.lookups = 0


class Client:
    """The peer that the server knows."""

    def __init__(self, server: Server, key: PrivateKey = KEYS[0]) -> None:
        self.server = server
        self.stamp = 0
        self.device = Device(key, random.Random(2).randbytes, self.timestamp)
        self.session = Session(self.device, KEYS[1].public, now=0.0, psk=bytes(32))
        self.handshakes = Handshakes(self.device, lambda key: self.session)

    def timestamp(self, now: float) -> bytes:
        self.stamp += 1
        return self.stamp.to_bytes(12, "big")

    def initiation(self) -> bytes:
        self.server.now += 6.0
        self.session.initiate(self.server.now)
        self.session.handle_timeout(self.server.now)
        assert self.session.initiation is not None
        return self.session.initiation


def other_mac1(datagram: bytes) -> bytes:
    return datagram[:-32] + bytes([datagram[-32] ^ 1]) + datagram[-31:]


# --- Without load --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_initiation_is_answered_to_where_it_came_from(source: Endpoint) -> None:
    server = Server()
    initiation = Client(server).initiation()
    ((response, destination),) = server.receive(initiation, source)
    assert destination == source
    assert (len(initiation), len(response)) == (INITIATION_SIZE, RESPONSE_SIZE)


def test_bad_mac1_gets_no_reply_and_costs_no_x25519() -> None:
    server = Server()
    client = Client(server)
    initiation = client.initiation()
    for position in range(len(initiation) - 16):
        damaged = bytearray(initiation)
        damaged[position] ^= 0x80
        assert server.receive(bytes(damaged)) == []
    assert server.lookups == 0
    assert server.dropped == {"mac1": INITIATION_SIZE - 16 - 4, "malformed": 4}
    server.load()
    assert server.receive(other_mac1(initiation)) == []
    assert server.dropped == {"mac1": 1}


def test_unknown_peer_gets_no_reply() -> None:
    server = Server()
    stranger = Client(server, PrivateKey(b"\7" * 32))
    assert server.receive(stranger.initiation()) == []
    assert server.dropped == {"unknown-peer": 1}


def test_stranger_who_claims_a_peers_static_key_gets_no_reply() -> None:
    """It can seal the peer's public key under es, but not the timestamp under ss."""
    server = Server()
    client = Client(server)
    initiation = client.initiation()
    forged = initiation[:88] + bytes(28)
    forged = MacMaker(KEYS[1].public).finish(forged, 0.0)
    assert server.receive(forged) == []
    assert server.lookups == 1
    assert server.dropped == {"forged-initiation": 1}
    assert server.receive(initiation) != []


def test_replayed_initiation_gets_no_reply_and_changes_no_key() -> None:
    server = Server()
    client = Client(server)
    first, second = client.initiation(), client.initiation()
    assert len(server.receive(second)) == 1
    keypair = server.session.next
    for replayed in (second, first, second):
        server.now += 1.0
        assert server.receive(replayed, UdpEndpoint("192.0.2.66", 666)) == []
    assert server.session.next is keypair
    assert server.dropped == {"replayed-initiation": 3}


def test_initiations_of_one_peer_in_quick_succession_are_read_once() -> None:
    server = Server()
    client = Client(server)
    initiations = [client.initiation() for _ in range(5)]
    answered = [len(server.receive(initiation)) for initiation in initiations]
    assert answered == [1, 0, 0, 0, 0]
    assert server.dropped == {"initiation-flood": 4}
    server.now += 0.021
    assert len(server.receive(initiations[1])) == 1


def test_forged_response_is_dropped_and_the_true_one_still_taken() -> None:
    server = Server()
    client = Client(server)
    ((response, _),) = server.receive(client.initiation())
    forged = MacMaker(KEYS[0].public).finish(response[:20] + bytes(40), 0.0)
    assert client.handshakes.receive(forged, HOME, server.now) is None
    assert client.handshakes.receive(other_mac1(response), HOME, server.now) is None
    assert not client.session.usable(server.now)
    assert client.handshakes.receive(response, HOME, server.now) is client.session
    assert client.session.usable(server.now)
    assert client.handshakes.receive(response, HOME, server.now) is None
    assert dict(client.handshakes.dropped) == {"forged-response": 1, "mac1": 1, "unknown-index": 1}


def test_bytes_from_nowhere_are_counted_and_nothing_else() -> None:
    rng = random.Random(3)
    server = Server()
    for _ in range(2000):
        datagram = bytearray(rng.randbytes(rng.choice([0, 1, 4, 31, 32, 64, 92, 148, 200])))
        if rng.random() < 0.8 and len(datagram) >= 4:
            datagram[:4] = bytes([rng.randint(0, 5), 0, 0, 0])
        assert server.receive(bytes(datagram)) == []
        assert server.handshakes.open_transport(bytes(datagram), server.now) is None
    assert set(server.dropped) == {"malformed", "mac1", "unknown-index"}
    assert sum(server.dropped.values()) == 4000
    assert not server.device.indices


def test_forged_transport_data_consumes_no_counter() -> None:
    pair = Pair()
    pair.connect()
    keypair = pair.alice.session.current
    assert keypair is not None
    true = seal_transport(keypair, data(1))
    for position in range(8, len(true)):
        forged = bytearray(true)
        forged[position] ^= 1
        assert pair.bob.handshakes.open_transport(bytes(forged), pair.now) is None
    opened = pair.bob.handshakes.open_transport(true, pair.now)
    assert opened is not None
    assert opened[2] == data(1)
    assert pair.bob.handshakes.open_transport(true, pair.now) is None


# --- Under load ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_under_load_a_cookie_must_be_fetched_first(source: Endpoint) -> None:
    server = Server()
    client = Client(server)
    initiation = client.initiation()
    server.load()
    ((reply, destination),) = server.receive(initiation, source)
    assert (len(reply), destination) == (COOKIE_SIZE, source)
    assert server.lookups == 0, "no X25519 without a cookie"

    assert client.handshakes.receive(reply, HOME, server.now) is None
    assert not client.handshakes.dropped
    second = client.initiation()
    server.load()
    ((response, _),) = server.receive(second, source)
    assert len(response) == RESPONSE_SIZE
    assert client.handshakes.receive(response, source, server.now) is client.session


def test_cookie_is_bound_to_address_and_port() -> None:
    places = [*SOURCES, UdpEndpoint(HOME.host, HOME.port + 1)]
    for given in places:
        for used in places:
            server = Server()
            client = Client(server)
            initiation = client.initiation()
            server.load()
            ((reply, _),) = server.receive(initiation, given)
            client.handshakes.receive(reply, given, server.now)
            second = client.initiation()
            server.load()
            ((answer, _),) = server.receive(second, used)
            assert len(answer) == (RESPONSE_SIZE if used == given else COOKIE_SIZE)


def test_old_cookie_is_not_used_any_more() -> None:
    server = Server()
    client = Client(server)
    initiation = client.initiation()
    server.load()
    ((reply, _),) = server.receive(initiation)
    client.handshakes.receive(reply, HOME, server.now)
    assert not client.initiation().endswith(bytes(16))
    server.now += 120.0
    assert client.initiation().endswith(bytes(16))


def test_cookie_for_a_response_is_taken_too() -> None:
    """The initiator is the one under load."""
    server = Server()
    client = Client(server)
    ((response, _),) = server.receive(client.initiation())
    macs = MacMaker(KEYS[0].public)
    index = next(iter(client.device.waiting))
    for _ in range(int(LOAD_BURST) + 1):
        flood = macs.finish(pack_response(1, index, bytes(48)), 0.0)
        client.handshakes.receive(flood, UdpEndpoint("192.0.2.66", 666), server.now)
        client.handshakes.poll_transmit()
    assert client.handshakes.under_load(server.now)
    assert client.handshakes.receive(response, HOME, server.now) is None
    reply = client.handshakes.poll_transmit()
    assert reply is not None
    assert len(reply[0]) == COOKIE_SIZE
    assert server.receive(reply[0]) == []
    assert server.dropped == {}
    client.handshakes.dropped.clear()
    ((response, _),) = server.receive(client.initiation())
    assert client.handshakes.receive(response, HOME, server.now) is client.session


def test_load_ends_a_second_after_the_flood() -> None:
    server = Server()
    server.load()
    assert server.handshakes.under_load(server.now + 0.9)
    assert not server.handshakes.under_load(server.now + 1.0)


def test_one_address_cannot_use_up_all_handshakes_under_load() -> None:
    limits = SourceLimits()
    assert [limits.allow("a", 100.0) for _ in range(7)] == [True] * int(SOURCE_BURST) + [False] * 2
    assert limits.allow("b", 100.0)
    assert not limits.allow("a", 100.01)
    assert limits.allow("a", 100.06)
    assert not limits.allow("a", 100.06)


def test_sources_that_are_remembered_are_bounded() -> None:
    limits = SourceLimits()
    allowed = [limits.allow(number, 100.0) for number in range(SOURCES_MAX + 10)]
    assert allowed == [True] * SOURCES_MAX + [False] * 10
    assert limits.allow("later", 101.0)


def test_replies_that_nobody_takes_are_bounded() -> None:
    server = Server()
    server.load()
    initiation = Client(server).initiation()
    server.load()
    for _ in range(1000):
        server.handshakes.receive(initiation, HOME, server.now)
    count = 0
    while server.handshakes.poll_transmit() is not None:
        count += 1
    assert count == 256
    assert server.dropped["replies-full"] == 1000 - 256


# --- Nothing is answered with more than it had ---------------------------------------------------------


@pytest.mark.parametrize("loaded", [False, True], ids=["idle", "under load"])
def test_no_reply_is_larger_than_its_request(loaded: bool) -> None:
    """All message types, well-formed, damaged, replayed and random, from a source without a cookie."""
    rng = random.Random(4)
    server = Server()
    client = Client(server)
    initiation = client.initiation()
    ((response, _),) = server.receive(initiation)
    client.handshakes.receive(response, HOME, server.now)
    keypair = client.session.current
    assert keypair is not None
    transport = seal_transport(keypair, data(1))
    server.load()
    ((cookie, _),) = server.receive(client.initiation())
    requests = [client.initiation(), initiation, response, cookie, transport, seal_transport(keypair, b"")]
    macs = MacMaker(KEYS[1].public)
    requests += [macs.finish(pack_initiation(rng.getrandbits(32), rng.randbytes(108)), 0.0) for _ in range(9)]
    index = next(iter(server.device.indices))
    requests += [macs.finish(pack_response(7, index, rng.randbytes(48)), 0.0) for _ in range(9)]
    requests += [
        bytes([kind, 0, 0, 0]) + rng.randbytes(n) for kind in range(1, 5) for n in (0, 28, 60, 88, 144)
    ]
    answered = set()
    for request in requests:
        if loaded:
            server.load()
        else:
            server.now += 5.0
        assert server.handshakes.under_load(server.now) == loaded
        replies = server.receive(request)
        server.handshakes.open_transport(request, server.now)
        replies += [(datagram, HOME) for datagram in iter(server.session.poll_transmit, None)]
        assert sum(len(datagram) for datagram, _ in replies) <= len(request)
        answered |= {datagram[0] for datagram, _ in replies}
        if loaded:
            assert answered <= {3}
    assert answered == ({3} if loaded else {2})
