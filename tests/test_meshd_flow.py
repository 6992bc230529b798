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
from crossedge.meshd.delivery import Delivery
from crossedge.meshd.flow import FLOWS_KEPT
from crossedge.meshd.link import Link
from crossedge.meshd.policy import Policy
from crossedge.meshd.sink import Sink
from crossedge.meshd.virtio import ALL_OFFLOADS, GSO_TYPES, HEADER, SIZE, Offloads
from tests import data_pair as lab

OURS = ("10.160.1.0/24", "fd00:1::/64")
THEIRS = ("10.160.2.0/24", "fd00:2::/64")
OTHERS = ("10.160.2.0/28", "10.160.3.0/24", "fd00:2::/96", "fd00:3::/64")
HOP_BY_HOP = b"\x06\0\1\4\0\0\0\0"  # then TCP
ROUTING = b"\x06\0\0\1\0\0\0\0"  # one more stop, then TCP


def with_options(packet: bytes) -> bytes:
    """An IPv4 packet with four bytes of options, and its checksum as it was."""
    return b"\x46" + packet[1:2] + struct.pack("!H", len(packet) + 4) + packet[4:20] + b"\1\1\1\0" + packet[20:]


def extended(packet: bytes, header: bytes, kind: int) -> bytes:
    """An IPv6 packet with an extension header of eight bytes."""
    length = struct.pack("!H", len(packet) - 40 + 8)
    return packet[:4] + length + bytes([kind]) + packet[7:40] + header + packet[40:]


def frames_between(four: tuple[str, str], six: tuple[str, str]) -> list[bytes]:
    """Frames of all kinds, as a kernel makes them, from the first address of each pair to the second."""
    v4, v6 = ({"source": source, "destination": destination} for source, destination in (four, six))
    made = []
    for ends in (v4, v6):
        udps = [lab.udp(bytes(size), partial=True, **ends) for size in (100, 101)]
        made += [
            lab.plain(lab.tcp(b"", **ends)),
            lab.partial_frame(lab.tcp(b"", partial=True, **ends)),
            lab.partial_frame(lab.tcp(b"data", partial=True, options=b"", **ends)),
            lab.plain(lab.tcp(bytes(700), **ends)),
            *(lab.partial_frame(packet) for packet in (*udps, udps[0])),
            *(
                lab.super_frame(lab.tcp(bytes(size), partial=True, **ends), gso)
                for size, gso in ((1000, 300), (9000, 1300), (9001, 1300), (20_000, 1300))
            ),
            *(lab.super_frame(lab.udp(bytes(size), partial=True, **ends), 120) for size in (600, 5000)),
            lab.plain(lab.ip(ends["source"], ends["destination"], 1, bytes(64))),
        ]
    for packet in (lab.tcp(bytes(50), **v4), lab.ip(*four, 6, bytes(60), df=False)):
        made += [lab.plain(packet), lab.plain(with_options(packet)), lab.plain(packet[:6] + b"\0\7" + packet[8:])]
    for header, kind in ((HOP_BY_HOP, 0), (ROUTING, 43), (bytes(8), 44)):
        made.append(lab.plain(extended(lab.tcp(bytes(50), **v6), header, kind)))
    return made


def mutated(frame: bytes, pick: random.Random) -> bytes:
    """A frame with something about its headers or its length changed."""
    kind = pick.randrange(6)
    if kind == 0:
        return frame[: pick.randrange(SIZE + 1, len(frame) + 1)]
    if kind == 1:
        return frame + bytes(pick.randrange(1, 9))
    if kind == 2:
        return frame[:4] + struct.pack("=H", pick.choice((0, 1, 7, 8, 500, 1360, 60_000))) + frame[6:]
    if kind == 3:
        return frame[:SIZE] + frame[SIZE : SIZE + 54].ljust(54, b"\0")[: pick.randrange(1, 55)]
    changed = bytearray(frame)
    at = pick.randrange(min(len(frame), SIZE + 60))
    changed[at] = pick.choice((0, 1, 5, 0x40, 0x45, 0x60, 0x80, 0xFF, changed[at] ^ 1, changed[at] ^ 0x10))
    return bytes(changed)


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


@settings(max_examples=120)
@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 99), min_size=4, max_size=40))
def test_a_plane_that_remembers_flows_sends_what_a_new_one_sends(pick: random.Random, steps: list[int]) -> None:
    (old, _), (new, _) = lab.pair(size=1472), lab.pair(size=1472)
    good = frames_between((lab.A4, lab.B4), (lab.A6, lab.B6))
    pool = pick.sample(good, 5)
    pool += [mutated(frame, pick) for frame in pool for _ in range(2)]
    pool += pick.sample(frames_between(("10.160.1.9", "10.160.3.3"), ("fd00:9::1", "fd00:3::1")), 2)
    dropped: Counter[str] = Counter()
    for now, step in enumerate(steps, int(lab.NOW)):
        if step < 13:
            turn(old, step)
            turn(new, step)
        drain = pick.choices(pool, k=1 + step % 3)
        new.plane = new.fresh_plane()
        new.plane._outbound._flows = Forgetful()
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
    remembers: bool = True
    written: list[bytes] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        sink = Sink(lambda frame: self.written.append(bytes(frame)), self.offloads)
        self.delivery = Delivery(sink, Policy(self.allowed, self.own), 1380, self.dropped)
        if not self.remembers:
            self.delivery._flows = Forgetful()

    def take(self, link: int, packet: bytes, asked: tuple[int, int, bool], lone: bool) -> None:
        frame = memoryview(bytearray(bytes(SIZE) + packet))
        (self.delivery.lone if lone else self.delivery.frame)(self.links[link], frame, *asked)


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


@settings(max_examples=150)
@given(
    OFFLOADS,
    st.randoms(use_true_random=False),
    st.lists(st.integers(0, 60), min_size=4, max_size=60),
)
def test_a_delivery_that_remembers_flows_writes_what_a_new_one_writes(
    offloads: Offloads, pick: random.Random, steps: list[int]
) -> None:
    links, allowed, own = tables()
    old = Taker(links, allowed, own, offloads)
    good = frames_between((lab.B4, lab.A4), (lab.B6, lab.A6))
    pool = pick.sample(good, 5)
    pool += [mutated(frame, pick) for frame in pool for _ in range(2)]
    pool += pick.sample(frames_between(("10.160.3.3", "10.160.1.1"), ("fd00:3::1", "fd00:1::1")), 2)
    dropped: Counter[str] = Counter()
    for step in steps:
        if step < 6:
            change(allowed, (*THEIRS, *OTHERS)[step], links[step % 2])
        elif step < 8:
            change(own, OURS[step - 6], True)
        new = Taker(links, allowed, own, offloads, remembers=False)
        for _ in range(1 + step % 3):
            frame = pick.choice(pool)
            flags, gso_type, _, gso_size, _, _ = HEADER.unpack_from(frame.ljust(SIZE, b"\0"))
            arguments = (
                int(pick.randrange(8) == 0),
                frame[SIZE:],
                (gso_type, gso_size, bool(flags)),
                step % 3 == 0 and pick.randrange(2) == 0,
            )
            old.take(*arguments)
            new.take(*arguments)
        old.delivery.flush()
        new.delivery.flush()
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
        assert len(alice.plane._outbound._flows) <= FLOWS_KEPT
        assert len(taker.delivery._flows) <= FLOWS_KEPT
