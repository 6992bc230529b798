"""Every decoder of untrusted bytes, as something that one can hand bytes to.

`fuzz_covered` says which decoder is tried by which entry. An entry is tried with any bytes; only its
`refusal` may come out: `WireError`, but where programs of the host itself, and not the network, are on the
other side.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import msgpack

from crossedge.cni.spec import CniError, parse_config
from crossedge.latency.feed import Feed
from crossedge.latency.report import Report, unpack_coordinates, unpack_pairs
from crossedge.meshd import inner, packet, stunclient, virtio
from crossedge.meshd.control import ControlServer
from crossedge.meshd.keypair import seal_transport
from crossedge.meshd.lifetime import SOCKETS, LifetimeCheck
from crossedge.meshd.netcheck import Netcheck
from crossedge.meshd.noise import NoiseError, PrivateKey, Responder
from crossedge.meshd.superframe import HEADER, MAGIC, nonce
from crossedge.meshd.wireguard import handshake_type
from crossedge.rendezvous.admission import examine
from crossedge.rendezvous.checkpoint import decode_checkpoint
from crossedge.rendezvous.control import ControlSocket
from crossedge.sched.extender import MalformedError, parsed_args
from crossedge.wire import stun
from crossedge.wire.armour import dearmour
from crossedge.wire.blocklist import Blocklist, Delegation
from crossedge.wire.bundle import Bundle, RendezvousAddress
from crossedge.wire.certificate import Certificate, Request
from crossedge.wire.codec import load
from crossedge.wire.demux import classify
from crossedge.wire.endpoint import SocketEndpoint, UdpEndpoint, unpack_address, unpack_endpoint
from crossedge.wire.envelope import CookieReply, Sealed, seal
from crossedge.wire.errors import WireError
from crossedge.wire.keyfiles import KeyKind, parse_key
from crossedge.wire.limits import MAX_PLAINTEXT
from crossedge.wire.messages import decode, unpack_endpoints, unpack_known, unpack_observed_by
from crossedge.wire.prefixes import unpack_prefix, unpack_prefixes, unpack_v4, unpack_v6
from crossedge.wire.record import Record, unpack_candidates, unpack_verdict
from crossedge.wire.relay import unpack_header
from tests.data_pair import ALICE, Side, keypairs, pair
from tests.fuzz_inputs import golden
from tests.meshd_client_world import World as ClientWorld
from tests.rendezvous_client import Node, World
from tests.simworld import SimNode, SimWorld

SERVER = UdpEndpoint("192.0.2.1", 3478)
STRANGER = UdpEndpoint("203.0.113.77", 777)


@dataclass(frozen=True)
class Entry:
    """Something that takes bytes."""

    run: Callable[[bytes], object]
    refusal: tuple[type[Exception], ...] = (WireError,)
    seeds: Callable[[], tuple[bytes, ...]] = golden


def _of_value(decoder: Callable[[object], object]) -> Callable[[bytes], object]:
    """Return what hands a decoder of msgpack's values the bytes, and the value in them."""

    def run(data: bytes) -> None:
        with suppress(WireError):
            decoder(data)
        try:
            value = msgpack.unpackb(data, use_list=False, strict_map_key=False)
        except (ValueError, TypeError, RecursionError):
            return
        decoder(value)

    return run


def _packet(data: bytes) -> None:
    layout = packet.outline(data)
    packet.claimed_length(data)
    packet.source_routed(data)
    packet.transport_header(data, layout)
    packet.checksum_place(data, layout)
    with suppress(WireError):
        packet.dissect(data)
    if data:
        kind = data[-1]
        virtio.Header.for_packet(data, layout, kind & 0x87, data[0] << 4, bool(kind & 8), 1500)


def _responder(data: bytes) -> None:
    responder = Responder(PrivateKey(b"\x01" * 32))
    responder.read_static(data)
    responder.read_payload()


# --- The rendezvous ---------------------------------------------------------------------------------------


@cache
def _rendezvous() -> tuple[World, Node]:
    world = World()
    node = Node(world, "known")
    node.register()
    world.service.set_blocklist(world.blocklist(1, {"gone": 1}), world.now)
    return world, node


def _drained(world: World, datagram: bytes, source: UdpEndpoint) -> None:
    world.now += 1.0  # rates are tried elsewhere
    world.service.receive_train(
        memoryview(datagram), 100 if len(datagram) > 1400 else 0, source, 0, world.now
    )
    while world.service.poll_transmit() is not None:
        pass
    world.received.clear()


def _door(data: bytes) -> None:
    _drained(_rendezvous()[0], data, STRANGER)


def _requests(data: bytes) -> None:
    """What a registered node seals."""
    world, node = _rendezvous()
    _drained(world, seal(data[:MAX_PLAINTEXT], node.pair, world.random.randbytes(24)), node.endpoint)


def _admission(data: bytes) -> None:
    world, node = _rendezvous()
    directories = world.service.registry.directories
    certificate, record = node.certificate.encode(), node.record.encode()
    for each in ((data, record), (certificate, data)):
        with suppress(WireError):
            examine(*each, node.control.public, directories, 1_800_000_000.0)


def _rendezvous_blocklist(data: bytes) -> None:
    world, _ = _rendezvous()
    world.service.set_blocklist(data, world.now)


@cache
def _rendezvous_seeds() -> tuple[bytes, ...]:
    world, node = _rendezvous()
    return (
        node.seal(node.registration()),
        node.certificate.encode(),
        node.record.encode(),
        world.blocklist(2, {"gone": 2}),
        world.service.checkpoint(),
        *golden(),
    )


# --- The daemon -------------------------------------------------------------------------------------------


class _Caught:
    """Two nodes that have met, and what one of them received."""

    def __init__(self) -> None:
        self.world = SimWorld(seed=3)
        self.alice, self.bob = self.world.node("alice"), self.world.node("bob")
        self.datagrams: list[bytes] = []
        receive = self.bob.receive

        def noted(datagram: bytes, source: Any, now: float) -> None:
            self.datagrams.append(bytes(datagram))
            receive(datagram, source, now)

        with patch.object(self.bob, "receive", noted):
            self.world.settle()
            self.world.ping(self.alice, self.bob, count=100)
            assert self.world.direct(self.alice, self.bob)
        self.source = self.alice.host.endpoint(41820)

    def hand(self, datagram: bytes, source: UdpEndpoint) -> None:
        self.bob.receive(datagram, source, self.world.net.now)
        _drain(self.bob)


def _drain(node: SimNode) -> None:
    while node.poll_transmit() is not None:
        pass
    node.received.clear()
    node.events.clear()


_caught = cache(_Caught)


def _daemon(data: bytes) -> None:
    caught = _caught()
    caught.hand(data, caught.source)
    caught.hand(data, STRANGER)


def _in_session(data: bytes) -> None:
    """What a member seals as transport data: packets and in-session messages."""
    caught = _caught()
    keypair = caught.alice.peer(caught.bob).session.current
    assert keypair is not None
    caught.hand(seal_transport(keypair, data[:1400], pad=False), caught.source)


def _daemon_seeds() -> tuple[bytes, ...]:
    # One of each kind and length: most are alike.
    return tuple({(each[:4], len(each) // 16): each for each in _caught().datagrams}.values())


def _in_session_seeds() -> tuple[bytes, ...]:
    hello = inner.encode(inner.Bye(7)) if hasattr(inner, "encode") else bytes([9, 0, 0, 8, 0, 0, 0, 0])
    return (
        hello,
        *(bytes([kind, flags, 0, 60]) + bytes(4) + bytes(52) for kind in range(12) for flags in (0, 1)),
        *golden(),
    )


@cache
def _liar() -> tuple[Any, Side]:
    return keypairs()[0], pair()[1]


def _superframe(data: bytes) -> None:
    """What a member seals in records: of one datagram, of three chunks, and frames that a TUN may return."""
    keypair, bob = _liar()
    aead = keypair.chunks_send
    records = []
    for count in (1, 3):
        counter = keypair.reserve_chunks(1)
        body = aead.encrypt(nonce(counter, count, 0), data[:3000], None)
        size = -(-len(body) // count)
        records += [
            HEADER.pack(MAGIC, at, count, keypair.remote_index, counter) + body[at * size : (at + 1) * size]
            for at in range(count)
        ]
    bob.take(*records, source=ALICE)
    _forget(bob)


def _chunk(data: bytes) -> None:
    """Chunks of nobody: header and body are what they are."""
    keypair, bob = _liar()
    bob.take(data, source=ALICE)
    bob.take(MAGIC.to_bytes(2, "big") + data, source=ALICE)
    bob.take(HEADER.pack(MAGIC, 0, 2, keypair.remote_index, len(data)) + data, source=ALICE)
    _forget(bob)


def _forget(side: Side) -> None:
    for kept in (side.sent, side.written, side.control, side.inner, side.wanted, side.moved, side.unknown):
        kept.clear()


@cache
def _client() -> Any:
    world = ClientWorld()
    node = world.node()
    world.settle()
    return world, node


def _rendezvous_client(data: bytes) -> None:
    """What a rendezvous sends: bytes, and what it seals."""
    world, node = _client()
    now = world.net.now
    pair_keys = world.server.running.registry.leases[node.control_key.public].pair
    for datagram in (data, seal(data[:MAX_PLAINTEXT], pair_keys, world.net.random(24))):
        node.receive(datagram, SERVER, now)
    while node.poll_transmit() is not None:
        pass
    node.events.clear()
    node.times.clear()


def _directory(data: bytes) -> None:
    world, node = _client()
    now = world.net.now
    certificate = node.certificate.encode()
    for record, shown in ((data, certificate), (data, b""), (data, data)):
        node.directory.offer(record, shown, world.server.key.public[:8], now)
    node.directory.offer_blocklist(data, now)
    while node.directory.poll_event() is not None:
        pass


def _stun_clients(data: bytes) -> None:
    """Answers with the transaction that was asked for, and anything around it."""
    random = iter(range(1, 1000)).__next__

    def transaction(size: int) -> bytes:
        return random().to_bytes(size, "big")

    client = stunclient.StunClient(transaction)
    client.ask(SERVER, 0.0)
    observers = stunclient.StunObservers([SERVER], transaction, 0.0)
    observers.handle_timeout(0.0)
    lifetime = LifetimeCheck(SERVER, range(SOCKETS), transaction, 0.0)
    netcheck = Netcheck([SERVER], [1, 2, 3, 4, 5, 6, 7, 8], ["192.168.1.2"], transaction, 0.0)
    for number in range(1, random()):
        answer = data[:8] + number.to_bytes(12, "big") + data[20:]
        client.receive(answer, SERVER, 0, 0.1)
        observers.receive(answer, SERVER, 0.1)
        lifetime.receive(answer, SocketEndpoint(SERVER, 0), 0.1)
        netcheck.receive(answer, SERVER, 0, 0.1)
        netcheck.receive(answer, STRANGER, 1, 0.1)


def _stun_seeds() -> tuple[bytes, ...]:
    other = UdpEndpoint("192.0.2.2", 3479)
    six = UdpEndpoint("2001:db8::1", 1)
    return (
        stun.encode_success(bytes(12), SERVER, other, other),
        stun.encode_success(bytes(12), six, six, None),
        stun.encode_error(bytes(12), stun.UNKNOWN_ATTRIBUTE, (stun.CHANGE_REQUEST,)),
        stun.encode_request(bytes(12), True, True),
    )


# --- Local programs ---------------------------------------------------------------------------------------


def _control_sockets(data: bytes) -> None:
    """Both control sockets: whoever may open them sends one line."""
    said = ControlSocket({"status": dict})._answer(data)
    json.dumps(said)

    async def answers() -> None:
        async def status(request: object) -> Any:
            yield {}

        async for answer in ControlServer({"status": status})._answers(data):
            json.dumps(answer)

    asyncio.run(answers())


def _text_seeds() -> tuple[bytes, ...]:
    config = {"cniVersion": "1.1.0", "name": "crossedge", "type": "crossedge-cni", "prevResult": {"ips": []}}
    pod = {"Pod": {"metadata": {"annotations": {"crossedge.io/users": "a=1"}}}, "NodeNames": ["a"]}
    texts = (b'{"command": "status"}', json.dumps(config).encode(), json.dumps(pod).encode())
    return (*texts, b"[" * 5000, b'{"a":' * 3000, b"192.0.2.1:3478#" + b"A" * 43 + b"=", b"-----BEGIN")


ENTRIES: dict[str, Entry] = {
    "message": Entry(decode),
    "sealed message": Entry(Sealed.parse, seeds=_rendezvous_seeds),
    "cookie reply": Entry(CookieReply.parse),
    "relay envelope": Entry(unpack_header),
    "first bytes": Entry(classify, seeds=_daemon_seeds),
    "STUN": Entry(stun.decode, seeds=_stun_seeds),
    "endpoint": Entry(unpack_endpoint),
    "address": Entry(unpack_address),
    "certificate": Entry(Certificate.decode),
    "request": Entry(Request.decode),
    "record": Entry(Record.decode),
    "blocklist": Entry(Blocklist.decode),
    "delegation": Entry(Delegation.decode),
    "bundle": Entry(Bundle.decode),
    "report": Entry(Report.decode),
    "texts": Entry(
        lambda data: [
            _refused(reader, data)
            for reader in (Bundle.from_text, Request.from_text, Blocklist.from_text, Delegation.from_text)
        ],
        seeds=_text_seeds,
    ),
    "armour": Entry(lambda data: dearmour("BUNDLE", data, 1000), seeds=_text_seeds),
    "key file": Entry(lambda data: parse_key(KeyKind.CA, data), seeds=_text_seeds),
    "rendezvous address": Entry(
        lambda data: RendezvousAddress.parse(data.decode("utf-8", "surrogateescape")), seeds=_text_seeds
    ),
    "map": Entry(lambda data: load(data, 1 << 16)),
    **{
        f"value: {decoder.__name__}": Entry(_of_value(decoder))
        for decoder in (
            unpack_known,
            unpack_endpoints,
            unpack_observed_by,
            unpack_v4,
            unpack_v6,
            unpack_prefix,
            unpack_prefixes,
            unpack_verdict,
            unpack_candidates,
            unpack_pairs,
            unpack_coordinates,
        )
    },
    "latency report at the scheduler": Entry(
        lambda data: Feed(b"\x01" * 32).apply(data, 0.0, 1_760_000_000.0)
    ),
    "IP packet": Entry(_packet, seeds=_daemon_seeds),
    "WireGuard's form": Entry(handshake_type),
    "WireGuard initiation": Entry(_responder, refusal=(NoiseError,)),
    "in-session message": Entry(inner.decode, seeds=_in_session_seeds),
    "datagram at a daemon": Entry(_daemon, seeds=_daemon_seeds),
    "what a member seals": Entry(_in_session, seeds=_in_session_seeds),
    "superframe record of a member": Entry(_superframe, seeds=_in_session_seeds),
    "chunk of nobody": Entry(_chunk, seeds=_daemon_seeds),
    "what a rendezvous sends": Entry(_rendezvous_client),
    "statements for a directory": Entry(_directory),
    "STUN answer to a question": Entry(_stun_clients, seeds=_stun_seeds),
    "datagram at a rendezvous": Entry(_door, seeds=_rendezvous_seeds),
    "what a node seals for a rendezvous": Entry(_requests),
    "statements at a rendezvous": Entry(_admission, seeds=_rendezvous_seeds),
    "blocklist at a rendezvous": Entry(_rendezvous_blocklist, seeds=_rendezvous_seeds),
    "checkpoint": Entry(decode_checkpoint, seeds=_rendezvous_seeds),
    "control sockets": Entry(_control_sockets, seeds=_text_seeds),
    "kube-scheduler's request": Entry(parsed_args, (MalformedError,), _text_seeds),
    "CNI configuration": Entry(parse_config, (CniError,), _text_seeds),
}


def _refused(decoder: Callable[[bytes], object], data: bytes) -> None:
    with suppress(WireError):
        decoder(data)
