"""Two data paths joined in memory, for the tests of the data path; packets to feed them are `data_packets`'.

    alice: 10.160.1.0/24, fd00:1::/64  ---- datagrams ---->  bob: 10.160.2.0/24, fd00:2::/64
                                       <---- datagrams ----

What a side writes to its TUN is cut into plain packets with whole checksums (`Side.packets`), by code of the
tests' own, so that what left one TUN and what came to the other can be compared packet by packet.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from hypothesis import strategies as st

from crossedge.meshd.allowedips import AllowedIPs
from crossedge.meshd.dataplane import DataPlane
from crossedge.meshd.inbound import Arrival
from crossedge.meshd.keypair import AeadName, Keypair
from crossedge.meshd.link import SAFE_DATAGRAM, Link
from crossedge.meshd.superframe import HEADER_SIZE
from crossedge.meshd.virtio import ALL_OFFLOADS, GSO_TYPES, Offloads
from crossedge.wire.endpoint import Endpoint, RelayEndpoint, UdpEndpoint
from tests.data_packets import A4 as A4
from tests.data_packets import A6 as A6
from tests.data_packets import B4 as B4
from tests.data_packets import B6 as B6
from tests.data_packets import big_super_frame as big_super_frame
from tests.data_packets import checksum as checksum
from tests.data_packets import ip as ip
from tests.data_packets import packets_of as packets_of
from tests.data_packets import partial_frame as partial_frame
from tests.data_packets import plain as plain
from tests.data_packets import pseudo as pseudo
from tests.data_packets import segments as segments
from tests.data_packets import super_frame as super_frame
from tests.data_packets import tcp as tcp
from tests.data_packets import transport_offset as transport_offset
from tests.data_packets import udp as udp
from tests.data_packets import unnumbered as unnumbered
from tests.data_packets import with_checksum as with_checksum

ALICE, BOB = UdpEndpoint("192.0.2.1", 41820), UdpEndpoint("192.0.2.2", 41820)
RELAY = RelayEndpoint(UdpEndpoint("198.51.100.1", 3478), 0x1234)
NOW = 1000.0


class FakeSession:
    """Keypairs without handshakes, and what the data path told of them."""

    def __init__(self) -> None:
        self.current: Keypair | None = None
        self.sent: list[tuple[float, int]] = []
        self.received: list[tuple[float, int, Keypair]] = []
        self.told: Callable[[str], object] = lambda _: None

    def data_sent(self, now: float, size: int) -> None:
        self.told("sent")
        self.sent.append((now, size))

    def data_received(self, now: float, size: int, keypair: Keypair) -> None:
        self.told("received")
        self.received.append((now, size, keypair))


@dataclass
class Side:
    """One data path with one link, everything it did kept."""

    name: str
    endpoint: UdpEndpoint
    own: tuple[str, ...]
    others: tuple[str, ...]
    stock: bool = False
    offloads: Offloads = ALL_OFFLOADS
    sent: list[tuple[Endpoint, bytes, int]] = field(default_factory=list)
    written: list[bytes] = field(default_factory=list)
    control: list[tuple[bytes, Endpoint, float]] = field(default_factory=list)
    inner: list[tuple[str, bytes, Endpoint, float]] = field(default_factory=list)
    wanted: list[str] = field(default_factory=list)
    moved: list[Endpoint] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    reported: list[Keypair] = field(default_factory=list)
    answers: list[Callable[[], object]] = field(default_factory=list)
    """What to do when the TUN may have an answer."""

    def __post_init__(self) -> None:
        self.session = FakeSession()
        self.link = Link(self.name, self.session, stock=self.stock)
        self.allowed: AllowedIPs[Link] = AllowedIPs()
        self.mine: AllowedIPs[bool] = AllowedIPs()
        for prefix in self.others:
            self.allowed.insert(ip_network(prefix), self.link)
        for prefix in self.own:
            self.mine.insert(ip_network(prefix), True)
        self.indices: dict[int, tuple[object, Keypair]] = {}
        self.plane = self.fresh_plane()

    def fresh_plane(self) -> DataPlane:
        """Return a data path that remembers nothing, between the same ends."""
        return DataPlane(
            allowed=self.allowed,
            own=self.mine,
            indices=self.indices,
            link_of=lambda session: self.link if session is self.session else None,
            transmit=lambda endpoint, parts, segment: self.sent.append((endpoint, b"".join(parts), segment)),
            write=lambda frame: self.written.append(bytes(frame)),
            control=lambda *said: self.control.append(said),
            inner=lambda link, *said: self.inner.append((link.name, *said)),
            wanted=lambda link: self.wanted.append(link.name),
            moved=lambda _, source, size: self.moved.append(source),
            unknown=lambda address: self.unknown.append(str(ip_address(address))),
            report=lambda _, keypair: self.reported.append(keypair),
            written=self.answer,
            offloads=self.offloads,
        )

    def answer(self) -> None:
        """Do what waits for something to have been written."""
        while self.answers:
            self.answers.pop(0)()

    def read(self, *frames: bytes, now: float = NOW) -> None:
        """Let one drain of the TUN return these frames."""
        for frame in frames:
            self.plane.buffer[: len(frame)] = frame
            self.plane.outbound(len(frame), now)
        self.plane.flush(now)

    def read_lone(self, frame: bytes, now: float = NOW) -> bool:
        """Let the TUN return one frame that comes alone; returns whether it went the short way."""
        self.plane.buffer[: len(frame)] = frame
        if self.plane.lone(len(frame), now):
            return True
        self.plane.outbound(len(frame), now)
        self.plane.flush(now)
        return False

    def datagrams(self) -> list[bytes]:
        """Take what was sent, cut into datagrams."""
        taken = [
            train[at : at + segment]
            for _, train, segment in self.sent
            for at in range(0, len(train), segment)
        ]
        self.sent.clear()
        return taken

    def take(self, *datagrams: bytes, source: UdpEndpoint, now: float = NOW) -> None:
        """Let one wake-up receive these datagrams."""
        arrivals = []
        buffer = bytearray()
        for datagram in datagrams:
            start = len(buffer)
            buffer += datagram
            arrivals.append(Arrival(start, len(buffer), max(1, len(datagram)), source, now))
        self.plane.inbound(buffer, arrivals, now)

    def take_lone(self, datagram: bytes, source: UdpEndpoint, now: float = NOW) -> bool:
        """Receive one datagram that comes alone; returns whether it went the short way."""
        buffer = bytearray(datagram)
        if self.plane.inbound_lone(buffer, len(datagram), source, now):
            return True
        self.plane.inbound(buffer, [Arrival(0, len(datagram), max(1, len(datagram)), source, now)], now)
        return False

    def take_parted(self, *datagrams: bytes, source: UdpEndpoint, now: float = NOW) -> None:
        """Let one wake-up receive these as trains whose headers but the first were put aside.

        Where a record seems to begin, a train does.
        """
        arrivals = []
        buffer = bytearray()
        at = 0
        while at < len(datagrams):
            size, after = len(datagrams[at]), at + 1
            while after < len(datagrams) and len(datagrams[after]) == size and datagrams[after][2]:
                after += 1
            train, start = datagrams[at:after], len(buffer)
            at = after
            heads = b"".join(datagram[:HEADER_SIZE] for datagram in train[1:])
            buffer += train[0] + b"".join(datagram[HEADER_SIZE:] for datagram in train[1:])
            aside = memoryview(heads) if heads else None
            arrivals.append(Arrival(start, len(buffer), max(1, size), source, now, 0, aside))
            buffer += bytes(len(heads))
        self.plane.inbound(buffer, arrivals, now)

    def take_trains(self, *datagrams: bytes, source: UdpEndpoint, apart: int = 0, now: float = NOW) -> None:
        """Let one wake-up receive these as trains, as far as they are equally long (the last may be shorter).

        With `apart` each lies so many bytes behind the one before, and only equal ones are told together.
        """
        arrivals = []
        buffer = bytearray()
        at = 0
        while at < len(datagrams):
            size, after = len(datagrams[at]), at + 1
            while after < len(datagrams) and len(datagrams[after]) == size:
                after += 1
            if not apart and after < len(datagrams) and len(datagrams[after]) < size:
                after += 1
            start = len(buffer)
            for datagram in datagrams[at:after]:
                buffer += datagram.ljust(apart, b"?")
            end = len(buffer) - (max(0, apart - size) if apart else 0)
            arrivals.append(Arrival(start, end, max(1, size), source, now, apart))
            at = after
        self.plane.inbound(buffer, arrivals, now)

    def packets(self) -> list[bytes]:
        """Take what was written to the TUN, as the kernel would have delivered it."""
        taken = packets_of(*self.written)
        self.written.clear()
        return taken

    @property
    def dropped(self) -> dict[str, int]:
        return {reason: count for reason, count in self.plane.dropped.items() if count}


def keypairs(now: float = NOW, aead: AeadName | None = "aes-256-gcm") -> tuple[Keypair, Keypair]:
    """Both ends of one keypair, with superframe keys."""
    first, second = (
        Keypair(
            local_index=own,
            remote_index=other,
            created=now,
            initiator=own == 7,
            send_key=out,
            receive_key=back,
        )
        for own, other, out, back in ((7, 9, b"a" * 32, b"b" * 32), (9, 7, b"b" * 32, b"a" * 32))
    )
    if aead is not None:
        first.enable_superframes(aead)
        second.enable_superframes(aead)
    return first, second


def pair(
    *,
    superframes: bool = True,
    size: int = SAFE_DATAGRAM,
    stock: bool = False,
    aead: AeadName = "aes-256-gcm",
    offloads: Offloads = ALL_OFFLOADS,
) -> tuple[Side, Side]:
    """Alice and bob with a session; `size` is what the path lets through, `offloads` are bob's."""
    alice = Side("bob", ALICE, ("10.160.1.0/24", "fd00:1::/64"), ("10.160.2.0/24", "fd00:2::/64"), stock)
    bob = Side(
        "alice", BOB, ("10.160.2.0/24", "fd00:2::/64"), ("10.160.1.0/24", "fd00:1::/64"), stock, offloads
    )
    for side, other, keypair in zip((alice, bob), (bob, alice), keypairs(aead=aead), strict=True):
        side.session.current = keypair
        side.indices[keypair.local_index] = side.session, keypair
        side.link.set_path((other.endpoint,), size)
        if superframes:
            side.link.allow_superframes(keypair, GSO_TYPES, 65_000)
    return alice, bob


def crossings(longest: int) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Return the strategy for what is to leave a TUN: kinds of frames, and the bytes of a piece of each."""
    kinds = st.sampled_from(["udp", "tcp", "tso", "uso", "tso6"])
    return st.lists(st.tuples(kinds, st.integers(6, longest)), max_size=25)


def check_crossing(alice: Side, bob: Side, steps: list[tuple[str, int]]) -> None:
    """Let these frames leave alice's TUN in one drain: all of their packets come to bob's, and no others."""
    frames = []
    for number, (kind, length) in enumerate(steps):
        body = struct.pack("!H", number) + random.Random(number).randbytes(length)
        ends = {"source": A6, "destination": B6} if kind == "tso6" else {}
        port = 1000 + number
        if kind == "udp":
            frames.append(plain(udp(body, port=port)))
        elif kind == "tcp":
            frames.append(partial_frame(tcp(body, port=port, partial=True)))
        elif kind == "uso":
            frames.append(super_frame(udp(body * 5, port=port, partial=True), len(body)))
        else:
            frames.append(super_frame(tcp(body * 9, port=port, partial=True, **ends), len(body)))
    alice.read(*frames)
    bob.take(*alice.datagrams(), source=ALICE)
    assert sorted(bob.packets()) == sorted(packets_of(*frames))
    assert not alice.dropped
    assert not bob.dropped
