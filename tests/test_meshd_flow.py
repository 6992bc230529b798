"""What the data path remembers of a flow changes nothing: each packet is dealt with as by one that is new."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.meshd.allowedips import AllowedIPs
from crossedge.meshd.coalesce import Coalescer
from crossedge.meshd.dataplane import MTU
from crossedge.meshd.delivery import Delivery
from crossedge.meshd.flow import FLOWS_KEPT
from crossedge.meshd.link import Link
from crossedge.meshd.packet import TCP_CHECKSUM, addresses, dissect, source_routed
from crossedge.meshd.policy import Policy
from crossedge.meshd.sink import Sink
from crossedge.meshd.virtio import (
    ALL_OFFLOADS,
    GSO_NONE,
    GSO_TCPV6,
    GSO_TYPES,
    HEADER,
    SIZE,
    Header,
    Offloads,
)
from crossedge.wire.errors import WireError
from tests import data_pair as lab

OURS = ("10.160.1.0/24", "fd00:1::/64")
THEIRS = ("10.160.2.0/24", "fd00:2::/64")
OTHERS = ("10.160.2.0/28", "10.160.3.0/24", "fd00:2::/96", "fd00:3::/64")
EXTENSIONS = {  # next header, and an extension header of eight bytes in front of TCP
    "hop by hop": (0, b"\x06\0\1\4\0\0\0\0"),
    "one more stop": (43, b"\x06\0\0\1\0\0\0\0"),
    "no more stops": (43, b"\x06\0\0\0\0\0\0\0"),
    "fragment": (44, b"\x06\0\0\0\0\0\0\0"),
}


def with_options(packet: bytes) -> bytes:
    """An IPv4 packet with four bytes of options, and its checksum as it was."""
    return (
        b"\x46" + packet[1:2] + struct.pack("!H", len(packet) + 4) + packet[4:20] + b"\1\1\1\0" + packet[20:]
    )


def extended(packet: bytes, header: bytes, kind: int) -> bytes:
    """An IPv6 packet with an extension header of eight bytes."""
    length = struct.pack("!H", len(packet) - 40 + 8)
    return packet[:4] + length + bytes([kind]) + packet[7:40] + header + packet[40:]


def families(four: tuple[str, str], six: tuple[str, str]) -> list[list[bytes]]:
    """Frames as a kernel makes them, by flow, from the first address of each pair to the second."""
    v4, v6 = ({"source": source, "destination": destination} for source, destination in (four, six))
    made = []
    for ends in (v4, v6):
        udps = [lab.udp(bytes(size), partial=True, **ends) for size in (100, 101)]
        made.append([lab.partial_frame(packet) for packet in (*udps, udps[0])])
        made[-1] += [
            lab.super_frame(lab.udp(bytes(size), partial=True, **ends), 60) for size in (40, 600, 3840, 3841)
        ]
        made.append([lab.super_frame(lab.tcp(bytes(size), partial=True, **ends), 300) for size in (200, 999)])
        made[-1] += [
            lab.super_frame(lab.tcp(bytes(size), partial=True, **ends), 1300) for size in (9000, 9001, 20_000)
        ]
        made.append(
            [
                lab.plain(lab.tcp(b"", **ends)),
                lab.plain(lab.tcp(bytes(700), **ends)),
                lab.partial_frame(lab.tcp(b"", partial=True, **ends)),
                lab.partial_frame(lab.tcp(b"data", partial=True, options=b"", **ends)),
            ]
        )
    plain = [lab.tcp(bytes(50), **v4), lab.ip(*four, 6, bytes(60), df=False), lab.ip(*four, 1, bytes(64))]
    fragments = [packet[:6] + b"\0\7" + packet[8:] for packet in plain]
    made.append([lab.plain(packet) for packet in (*plain, *fragments, *map(with_options, plain))])
    small = lab.tcp(bytes(50), **v6)
    made.append([lab.plain(extended(small, header, kind)) for kind, header in EXTENSIONS.values()])
    kind, header = EXTENSIONS["hop by hop"]
    for options in (b"", b"\1\1\1\1"):
        whole = extended(lab.tcp(bytes(9000), partial=True, options=options, **v6), header, kind)
        made[-1].append(HEADER.pack(1, GSO_TCPV6, 48, 1300, 48, TCP_CHECKSUM) + whole)
    return made


def resized(frame: bytes, size: int) -> bytes:
    """A frame with so long a packet, by its IP header too."""
    packet = frame[SIZE:][:size].ljust(size, b"\0")
    if packet[0] >> 4 == 4:
        return frame[:SIZE] + packet[:2] + struct.pack("!H", size) + packet[4:]
    return frame[:SIZE] + packet[:4] + struct.pack("!H", max(0, size - 40)) + packet[6:]


def mutated(frame: bytes, pick: random.Random) -> bytes:
    """A frame with something about its headers or its length changed."""
    kind = pick.randrange(8)
    four = frame[SIZE] >> 4 == 4
    if kind == 0:
        return frame[: pick.randrange(SIZE + 1, len(frame) + 1)]
    if kind == 1:
        return frame + bytes(pick.randrange(1, 9))
    if kind == 2:
        return frame[:4] + struct.pack("=H", pick.choice((0, 1, 7, 8, 500, 1360, 60_000))) + frame[6:]
    if kind == 3:
        return resized(frame, pick.choice((*range(40, 80), 1400, 9500, 30_000)))
    changed = bytearray(frame)
    if kind < 7:  # what decides: version, fragment field, protocol, addresses, TCP header's length
        at = SIZE + pick.choice((0, 6, 7, 9, 9, 12, 19, 32, 32) if four else (0, 6, 6, 6, 8, 39, 52, 52))
    else:
        at = pick.randrange(min(len(frame), SIZE + 60))
    values = (0, 1, 6, 17, 43, 0x40, 0x45, 0x46, 0x50, 0x60, 0xF0, 0xFF, changed[at] ^ 1, changed[at] ^ 0x10)
    changed[at] = pick.choice(values)
    return bytes(changed)


def some_frames(pick: random.Random, flows: list[list[bytes]], others: list[list[bytes]]) -> list[bytes]:
    """Frames of a few flows, good ones and mutated ones, and two of others."""
    good = [frame for flow in pick.sample(flows, 2) for frame in flow]
    return good + [mutated(frame, pick) for frame in good] + [pick.choice(pick.choice(others)) for _ in "12"]


class Forgetful(dict[Any, Any]):
    """A table that keeps nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def change(table: AllowedIPs[Any], prefix: str, value: Any) -> None:
    """Give a prefix to a value, or take it away where it has it."""
    if table.remove(ip_network(prefix)) is not value:
        table.insert(ip_network(prefix), value)


# --- From the TUN -------------------------------------------------------------------------------------------


def turn(side: lab.Side, number: int) -> None:
    """Let something about a link, its path or the policy be different from now on."""
    link, keypair = side.link, side.session.current
    if number < 4:
        change(side.allowed, (*THEIRS, *OTHERS)[number], side.link)
    elif number < 6:
        change(side.mine, OURS[number - 4], True)
    elif number == 6:
        link.growth.datagrams = 65 - link.growth.datagrams
    elif number == 7:
        link.set_path((lab.BOB,), 1232 if link.datagram_size > 1300 else 1472)
    elif number == 8:
        link.set_path((lab.RELAY,), 600)
    elif number == 9:
        link.agreed = keypair if link.agreed is None else None
    elif number == 10:
        link.gso = frozenset() if link.gso else GSO_TYPES
    elif number == 11:
        link.stock = not link.stock
    else:
        side.session.current = None if keypair is not None else side.indices[7][1]


def outcome(side: lab.Side) -> tuple[Any, ...]:
    """Take everything that a drain did."""
    link = side.link
    did = (
        [(*sent,) for sent in side.sent],
        list(side.written),
        list(side.wanted),
        list(side.unknown),
        list(link.queue),
        list(side.session.sent),
        (link.sent.datagrams, link.sent.size),
    )
    for kept in (side.sent, side.written, side.wanted, side.unknown, side.session.sent):
        kept.clear()
    return did


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 99), min_size=30, max_size=80))
def test_a_plane_that_remembers_flows_sends_what_a_new_one_sends(
    pick: random.Random, steps: list[int]
) -> None:
    (old, _), (new, _) = lab.pair(size=1472), lab.pair(size=1472)
    others = families(("10.160.1.9", "10.160.3.3"), ("fd00:9::1", "fd00:3::1"))
    pool = some_frames(pick, families((lab.A4, lab.B4), (lab.A6, lab.B6)), others)
    dropped: Counter[str] = Counter()
    for now, step in enumerate(steps, int(lab.NOW)):
        if step < 13:
            turn(old, step)
            turn(new, step)
        drain = pick.choices(pool, k=1 + step % 4)
        new.plane = new.fresh_plane()
        new.plane._outbound.flows = Forgetful()
        if len(drain) == 1:
            old.read_lone(*drain, now=now)
        else:
            old.read(*drain, now=now)
        new.read(*drain, now=now)
        dropped.update(new.plane.dropped)
        assert outcome(old) == outcome(new)
        assert old.dropped == +dropped


# --- From links ---------------------------------------------------------------------------------------------


@dataclass
class Taker:
    """A delivery to a TUN, from two links."""

    links: tuple[Link, Link]
    allowed: AllowedIPs[Link]
    own: AllowedIPs[bool]
    offloads: Offloads = ALL_OFFLOADS
    written: list[bytes] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.sink = Sink(lambda frame: self.written.append(bytes(frame)), self.offloads)
        self.delivery = Delivery(self.sink, Policy(self.allowed, self.own), MTU, self.dropped)
        self.coalescer = Coalescer(self.sink)

    def take(self, link: int, packet: bytes, asked: tuple[int, int, bool], lone: bool) -> None:
        frame = memoryview(bytearray(bytes(SIZE) + packet))
        if lone and asked[:2] == (0, 0):
            self.delivery.lone(self.links[link], frame, asked[2])
        else:
            self.delivery.frame(self.links[link], frame, *asked)

    def take_plainly(self, link: int, packet: bytes, asked: tuple[int, int, bool], lone: bool) -> None:
        """Do the same step by step, with nothing remembered."""
        frame = memoryview(bytearray(bytes(SIZE) + packet))
        try:
            layout = dissect(packet)
            verdict = Policy(self.allowed, self.own).inbound(addresses(packet))
            if verdict is not self.links[link]:
                raise WireError(verdict if isinstance(verdict, str) else "inner-source")
            if source_routed(packet):
                raise WireError("inner-source-route")
            virtio = Header.for_packet(packet, layout, *asked, MTU)
        except WireError as error:
            self.dropped[error.reason] += 1
            return
        if virtio.gso_type == GSO_NONE and not lone:
            self.coalescer.add(frame, layout, virtio, self.links[link])
            return
        if not lone:
            self.coalescer.flush()
        self.sink.write(frame, virtio, layout)


def tables() -> tuple[tuple[Link, Link], AllowedIPs[Link], AllowedIPs[bool]]:
    """Two links, whose networks they are, and ours."""
    links = Link("one", lab.FakeSession()), Link("two", lab.FakeSession())
    allowed: AllowedIPs[Link] = AllowedIPs()
    own: AllowedIPs[bool] = AllowedIPs()
    for prefix in THEIRS:
        allowed.insert(ip_network(prefix), links[0])
    allowed.insert(ip_network("10.160.3.0/24"), links[1])
    for prefix in OURS:
        own.insert(ip_network(prefix), True)
    return links, allowed, own


OFFLOADS = st.sampled_from([ALL_OFFLOADS, Offloads(True, frozenset({1, 4})), Offloads(False, frozenset())])


@settings(max_examples=100, deadline=None)
@given(
    OFFLOADS,
    st.randoms(use_true_random=False),
    st.lists(st.integers(0, 60), min_size=30, max_size=80),
)
def test_a_delivery_that_remembers_flows_writes_what_plain_steps_write(
    offloads: Offloads, pick: random.Random, steps: list[int]
) -> None:
    links, allowed, own = tables()
    old = Taker(links, allowed, own, offloads)
    others = families(("10.160.3.3", "10.160.1.1"), ("fd00:3::1", "fd00:1::1"))
    pool = some_frames(pick, families((lab.B4, lab.A4), (lab.B6, lab.A6)), others)
    dropped: Counter[str] = Counter()
    for step in steps:
        if step < 6:
            change(allowed, (*THEIRS, *OTHERS)[step], links[step % 2])
        elif step < 8:
            change(own, OURS[step - 6], True)
        new = Taker(links, allowed, own, offloads)
        for _ in range(1 + step % 6):
            frame = pick.choice(pool)
            flags, gso_type, _, gso_size, _, _ = HEADER.unpack_from(frame.ljust(SIZE, b"\0"))
            arguments = (
                int(pick.randrange(8) == 0),
                frame[SIZE:],
                (gso_type, gso_size, bool(flags)),
                step % 6 == 0,
            )
            old.take(*arguments)
            new.take_plainly(*arguments)
        old.delivery.flush()
        new.coalescer.flush()
        dropped.update(new.dropped)
        assert old.written == new.written
        assert old.dropped == dropped
        old.written.clear()


# --- By name ------------------------------------------------------------------------------------------------


def kinds_of_flows() -> Iterator[tuple[bytes, bytes]]:
    """Frames, and the same with the last byte missing."""
    for make in (lab.tcp, lab.udp):
        for ends in ({}, {"source": lab.A6, "destination": lab.B6}):
            frame = lab.super_frame(make(bytes(6000), partial=True, **ends), 1200)
            yield frame, frame[:-1]


def test_a_flow_whose_destination_moves_or_goes_is_judged_again_at_once() -> None:
    alice, _ = lab.pair()
    frame = lab.plain(lab.tcp(b""))
    alice.read(frame)
    alice.read(frame)
    assert len(alice.datagrams()) == 2
    alice.allowed.remove(ip_network("10.160.2.0/24"))
    alice.read(frame)
    assert (alice.datagrams(), alice.dropped) == ([], {"outbound-no-peer": 1})
    alice.mine.remove(ip_network("10.160.1.0/24"))
    alice.read(frame)
    assert alice.dropped == {"outbound-no-peer": 1, "outbound-source": 1}


def test_a_peer_that_lost_an_address_is_not_believed_any_more() -> None:
    links, allowed, own = tables()
    taker = Taker(links, allowed, own)
    arrival = lab.tcp(b"", source=lab.B4, destination=lab.A4), (0, 0, False), True
    taker.take(0, *arrival)
    taker.take(0, *arrival)
    assert len(taker.written) == 2
    taker.take(1, *arrival)
    assert taker.dropped == {"inner-source": 1}
    allowed.insert(ip_network("10.160.2.0/24"), links[1])
    taker.take(0, *arrival)
    assert (len(taker.written), taker.dropped) == (2, {"inner-source": 2})
    own.remove(ip_network("10.160.1.0/24"))
    taker.take(1, *arrival)
    assert (len(taker.written), taker.dropped) == (2, {"inner-source": 2, "inner-destination": 1})


@pytest.mark.parametrize(("frame", "short"), list(kinds_of_flows()), ids=["tcp4", "tcp6", "udp4", "udp6"])
def test_the_length_of_each_packet_of_a_flow_is_checked(frame: bytes, short: bytes) -> None:
    alice, _ = lab.pair()
    alice.read(frame)
    alice.read(short)
    alice.read(frame[: SIZE + 1])
    assert alice.dropped == {"outbound-malformed": 1, "outbound-version": 1}
    links, allowed, own = tables()
    own.insert(ip_network("10.160.2.0/24"), True)
    own.insert(ip_network("fd00:2::/64"), True)
    for prefix in OURS:
        own.remove(ip_network(prefix))
        allowed.insert(ip_network(prefix), links[0])
    taker = Taker(links, allowed, own)
    _, gso_type, _, gso_size, _, _ = HEADER.unpack_from(frame)
    for packet in (frame[SIZE:], frame[SIZE:], short[SIZE:], frame[SIZE : SIZE + 1], b""):
        taker.take(0, packet, (gso_type, gso_size, True), True)
    assert len(taker.written) == 2
    assert taker.dropped == {"inner-length": 1, "inner-truncated": 2}


def test_what_is_remembered_is_bounded() -> None:
    alice, _ = lab.pair()
    links, allowed, own = tables()
    taker = Taker(links, allowed, own)
    ends = {"source": lab.B4, "destination": lab.A4}
    for number in range(FLOWS_KEPT + 100):
        first, ttl = f"10.160.1.{number // 256 + 1}", number % 256
        alice.read(lab.plain(lab.tcp(b"", source=first, ttl=ttl)))
        taker.take(0, lab.tcp(b"", **ends, ttl=ttl), (0, 0, bool(number // 256 % 2)), True)
        taker.take(0, lab.udp(bytes(10), **ends, ttl=ttl, port=number), (0, 0, bool(number // 256 % 2)), True)
        assert len(alice.plane._outbound.flows) <= FLOWS_KEPT
        assert len(taker.delivery._flows) <= FLOWS_KEPT
