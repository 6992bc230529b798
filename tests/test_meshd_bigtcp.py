"""Super-packets beyond 64 KiB: what leaves as one comes out as the same stream, however it travels."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.meshd.bigtcp import JOINED
from crossedge.meshd.growth import RECORD_DATAGRAMS
from crossedge.meshd.outbound import LARGEST_FRAME
from crossedge.meshd.tun import TunShell
from crossedge.meshd.virtio import ALL_OFFLOADS, ETHERNET, HEADER, SIZE, Header
from tests.data_pair import (
    ALICE,
    B4,
    NOW,
    Side,
    big_super_frame,
    checksum,
    ip,
    packets_of,
    pair,
    plain,
    pseudo,
    segments,
    super_frame,
    tcp,
    unnumbered,
    with_checksum,
)

few = settings(derandomize=True, max_examples=60, deadline=None)
BIG = ALL_OFFLOADS._replace(big_tcp=True)
GSO = 1328  # segment size at an inner MTU of 1,380 bytes, with timestamps
SO_SNDBUFFORCE = 32
START = 2**32 - 70_000  # a sequence number that wraps on the way


def big_frame(payload: bytes, *, sequence: int = START, flags: int = 0x10) -> bytes:
    """The frame of a super-packet beyond 64 KiB."""
    return big_super_frame(payload, GSO, sequence=sequence, flags=flags)


def stream_of(payload: bytes, *, sequence: int = START, flags: int = 0x10) -> list[bytes]:
    """The packets that a network card would have made of it, identifications blanked."""
    cuts = range(0, len(payload), GSO)
    return [
        unnumbered(
            tcp(
                payload[at : at + GSO],
                sequence=sequence + at,
                flags=flags if at == cuts[-1] else flags & ~0x09,
            )
        )
        for at in cuts
    ]


def lowered(frame: bytes) -> bytes:
    """A frame for a veth pair as it would be for a TUN: offsets count from the packet on."""
    flags, kind, header, gso_size, start, offset = HEADER.unpack_from(frame)
    if not flags:
        return frame
    return (
        HEADER.pack(flags, kind, max(0, header - ETHERNET), gso_size, start - ETHERNET, offset) + frame[10:]
    )


def cut(frame: bytes) -> list[bytes]:
    """The packets of a frame for a veth pair, of a super-packet beyond 64 KiB too; checks as it goes."""
    frame = lowered(frame)
    packet = frame[10:]
    if len(packet) <= 65_535:
        return [unnumbered(each) for each in segments(frame)]
    flags, kind, header, gso_size, start, offset = HEADER.unpack_from(frame)
    assert (flags, kind, start, offset) == (1, 1, 20, 16)
    assert packet[2:4] == bytes(2)
    assert checksum(packet[:20]) == 0xFFFF
    source, destination = str(ip_address(packet[12:16])), str(ip_address(packet[16:20]))
    assert struct.unpack_from("!H", packet, 36)[0] % 65535 == pseudo(source, destination, 6, len(packet) - 20)
    made = []
    for at in range(header, len(packet), gso_size):
        (sequence,) = struct.unpack_from("!I", packet, 24)
        last = at + gso_size >= len(packet)
        transport = (
            packet[20:24]
            + struct.pack("!I", (sequence + at - header) & 0xFFFFFFFF)
            + packet[28:33]
            + bytes([packet[33] if last else packet[33] & ~0x09])
            + packet[34:header]
            + packet[at : at + gso_size]
        )
        made.append(
            unnumbered(ip(source, destination, 6, with_checksum(source, destination, 6, transport, False)))
        )
    return made


class Joining:
    """Where a side writes, as a veth pair takes it."""

    def __init__(self, side: Side, refused: int = 0) -> None:
        self.side = side
        self.refused = refused
        self.parts: list[int] = []
        side.plane.write_to(lambda frame: side.written.append(bytes(frame)), self.join, BIG)

    def join(self, parts: list[memoryview]) -> bool:
        if self.refused:
            self.refused -= 1
            return False
        self.parts.append(len(parts))
        self.side.written.append(b"".join(parts))
        return True

    def packets(self) -> list[bytes]:
        taken = [packet for frame in self.side.written for packet in cut(frame)]
        self.side.written.clear()
        return taken


def grown(side: Side, datagrams: int = RECORD_DATAGRAMS) -> None:
    side.link.growth.datagrams = datagrams


def body(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize("size", [65_484, 65_485, 100 * GSO, 282 * GSO, 282 * GSO - 500])
@pytest.mark.parametrize("flags", [0x10, 0x18, 0x19])
@pytest.mark.parametrize("sequence", [1000, START])
def test_one_leaves_as_records_and_comes_out_joined(size: int, flags: int, sequence: int) -> None:
    alice, bob = pair(size=1472)
    joining = Joining(bob)
    for side in (alice, bob):
        grown(side)
    payload = body(size)
    for _ in range(2):  # of a flow that bob knows, too
        alice.read(big_frame(payload, sequence=sequence, flags=flags))
        datagrams = alice.datagrams()
        bob.take_parted(*datagrams, source=ALICE)
        assert not bob.dropped
        written = len(bob.written)
        assert joining.packets() == stream_of(payload, sequence=sequence, flags=flags)
    lengths = {len(datagram) for datagram in datagrams}
    assert len(lengths) <= 2
    parts = -(-size // (48 * GSO))
    if flags == 0x19:  # what ends the stream goes alone
        assert written == 2
    else:
        assert (written, joining.parts[-1]) == (1, parts)


def test_all_but_the_last_datagrams_of_a_burst_are_equally_long() -> None:
    alice, _ = pair(size=1472)
    grown(alice)
    for size in (282 * GSO, 100 * GSO, 282 * GSO - 700, 48 * GSO, 47 * GSO):
        payload = body(size)
        frame = big_frame(payload) if size > 65_484 else super_frame(tcp(payload, partial=True), GSO)
        alice.read(frame)
    assert {len(datagram) for datagram in alice.datagrams()} == {1472}


@few
@given(
    st.integers(65_484, LARGEST_FRAME - SIZE - 52),
    st.sampled_from([1, 2, 9, RECORD_DATAGRAMS]),
    st.sampled_from(["mesh", "not agreed", "stock"]),
    st.sampled_from([1252, 1400, 1472, 8972]),
    st.booleans(),
    st.sampled_from([1000, START, 2**32 - 300_000]),
)
def test_however_it_travels_the_stream_is_the_same(
    size: int, datagrams: int, peer: str, path: int, parted: bool, sequence: int
) -> None:
    alice, bob = pair(size=path, superframes=peer == "mesh", stock=peer == "stock")
    joining = Joining(bob)
    grown(alice, datagrams)
    payload = body(size)
    alice.read(big_frame(payload, sequence=sequence, flags=0x18))
    take = bob.take_parted if parted and peer == "mesh" else bob.take
    take(*alice.datagrams(), source=ALICE)
    assert not alice.dropped
    assert not bob.dropped
    got = joining.packets()
    if peer == "mesh":
        assert got == stream_of(payload, sequence=sequence, flags=0x18)
    at = sequence
    for packet in got:  # where it travels as transport data, segments are as long as the path lets them be
        assert int.from_bytes(packet[24:28], "big") == at & 0xFFFFFFFF
        at += len(packet) - 52
    assert b"".join(packet[52:] for packet in got) == payload


def test_it_waits_for_a_session_like_any_other() -> None:
    alice, bob = pair(size=1472)
    joining = Joining(bob)
    keypair, alice.session.current = alice.session.current, None
    payload = body(120 * GSO)
    alice.read(big_frame(payload))
    assert not alice.sent
    assert alice.wanted
    alice.session.current = keypair
    alice.plane.flush_queue(alice.link, NOW)
    bob.take(*alice.datagrams(), source=ALICE)
    assert joining.packets() == stream_of(payload)


@pytest.mark.parametrize("length", [0, 1, 65_535])
@pytest.mark.parametrize("version", [4, 6])
def test_a_length_that_is_not_its_own_is_refused(length: int, version: int) -> None:
    alice, _ = pair(size=1472)
    if version == 4:
        frame = big_frame(body(90_000))
        frame = frame[:12] + struct.pack("!H", length) + frame[14:]
        if not length:
            frame = frame[: SIZE + 60_000]
    else:
        frame = super_frame(
            tcp(b"x" * 3000, source="fd00:1::10", destination="fd00:2::10", partial=True), GSO
        )
        frame = frame[:14] + struct.pack("!H", length) + frame[16:] + bytes(90_000)
    alice.read(frame)
    assert not alice.sent
    assert alice.dropped == {"outbound-malformed": 1}


def burst(side: Side, frames: list[bytes]) -> list[bytes]:
    """The datagrams of frames that are read in one drain."""
    side.read(*frames)
    return side.datagrams()


def run_of(count: int, size: int = 40 * GSO, **fields: object) -> list[bytes]:
    """Super-packets that follow one another."""
    return [
        super_frame(tcp(body(size), sequence=START + number * size, partial=True, **fields), GSO)
        for number in range(count)
    ]


def test_super_packets_that_follow_one_another_are_joined_up_to_a_bound() -> None:
    alice, bob = pair(size=1472)
    joining = Joining(bob)
    grown(alice)
    frames = run_of(2 * JOINED + 2)
    bob.take_parted(*burst(alice, frames), source=ALICE)
    expected = packets_of(*frames)
    assert joining.packets() == expected
    # The first of a flow is judged at length, and goes alone.
    assert joining.parts == [JOINED, JOINED]
    assert bob.plane.counters()["joined_packets"] == 2 * JOINED
    bob.take_parted(*burst(alice, frames), source=ALICE)
    assert joining.packets() == expected
    assert joining.parts[2:] == [JOINED, JOINED, 2]


def test_without_big_tcp_they_are_written_as_they_came() -> None:
    alice, bob = pair(size=1472)
    grown(alice)
    frames = run_of(4)
    bob.take_parted(*burst(alice, frames), source=ALICE)
    assert [bytes(each)[SIZE + 24 :] for each in bob.written] == [each[SIZE + 24 :] for each in frames]


def test_where_there_is_no_memory_for_all_at_once_they_are_written_as_they_came() -> None:
    alice, bob = pair(size=1472)
    grown(alice)
    frames = [*run_of(4), *run_of(3, flags=0x18)[2:]]
    joining = Joining(bob)
    bob.take_parted(*burst(alice, frames), source=ALICE)
    joining.packets()
    joining.refused = 99
    joining.parts.clear()
    bob.take_parted(*burst(alice, frames), source=ALICE)
    assert not joining.parts
    assert len(bob.written) == 5
    assert joining.packets() == packets_of(*frames)


DIFFERENT = {
    "acknowledgement": (28, b"\0\0\0\x4e"),
    "window": (34, b"\x03\0"),
    "timestamps": (44, b"87654321"),
    "a flag": (33, b"\x30"),
    "congestion": (33, b"\x90"),
    "ttl": (8, b"\x3f"),
    "tos": (1, b"\x02"),
    "source": (15, b"\x0b"),
    "fragments allowed": (6, b"\0"),
}


@pytest.mark.parametrize("what", [*DIFFERENT, "a gap", "again", "a shorter one before", "push", "port"])
def test_what_differs_is_not_joined_and_order_is_kept(what: str) -> None:
    alice, bob = pair(size=1472)
    joining = Joining(bob)
    grown(alice)
    first, second = run_of(2)
    if what in DIFFERENT:
        at, value = DIFFERENT[what]
        packet = second[SIZE:]
        packet = packet[:at] + value + packet[at + len(value) :]
        packet = packet[:10] + bytes(2) + packet[12:]
        packet = packet[:10] + struct.pack("!H", ~checksum(packet[:20]) & 0xFFFF) + packet[12:]
        if what == "source":
            packet = packet[:20] + with_checksum("10.160.1.11", B4, 6, packet[20:], True)
        second = second[:SIZE] + packet
    elif what == "a gap":
        second = super_frame(tcp(body(40 * GSO), sequence=START + 41 * GSO, partial=True), GSO)
    elif what == "again":
        second = first
    elif what == "a shorter one before":
        first = super_frame(tcp(body(40 * GSO - 8), sequence=START + 8, partial=True), GSO)
    elif what == "push":
        first = super_frame(tcp(body(40 * GSO), sequence=START, flags=0x18, partial=True), GSO)
    else:
        second = super_frame(tcp(body(40 * GSO), sequence=START + 40 * GSO, port=40001, partial=True), GSO)
    for frames in ([first, second],) * 2:
        bob.take_parted(*burst(alice, frames), source=ALICE)
        assert joining.packets() == packets_of(*frames)
    assert not joining.parts


@few
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=12),
    st.booleans(),
    st.sampled_from([5000, START]),
)
def test_whatever_comes_between_nothing_changes_and_nothing_overtakes(
    steps: list[tuple[int, int]], refused: bool, first: int
) -> None:
    alice, bob = pair(size=1472)
    joining = Joining(bob, 99 if refused else 0)
    grown(alice)
    at = [first, 1000]
    frames = []
    for kind, odd in steps:
        number = odd % 2
        size = {0: 47 * GSO, 1: 47 * GSO, 2: 120 * GSO, 3: 20 * GSO, 4: 500, 5: 47 * GSO - 9}[kind]
        flags = 0x18 if odd == 3 else 0x10
        if size > 65_484:
            frames.append(big_frame(body(size), sequence=at[0], flags=flags))
            at[0] += size
            continue
        packet = tcp(body(size), sequence=at[number], flags=flags, partial=size > GSO, port=40000 + number)
        at[number] += size
        frames.append(super_frame(packet, GSO) if size > GSO else plain(packet))
    expected = [packet for frame in frames for packet in cut(lifted(frame))]
    for _ in range(2):
        alice.read(*frames)
        bob.take_parted(*alice.datagrams(), source=ALICE)
        got = joining.packets()
        for port in (40000, 40001):
            mine = struct.pack("!H", port)
            assert [each for each in got if each[20:22] == mine] == [
                each for each in expected if each[20:22] == mine
            ]
        assert len(got) == len(expected)
    assert not bob.dropped


def lifted(frame: bytes) -> bytes:
    """The opposite of `lowered`."""
    return Header(*HEADER.unpack_from(frame)).pack(ETHERNET) + frame[SIZE:]


# --- The shell ---------------------------------------------------------------------------------------------


class Veth:
    """The shell between two sockets that keep packets apart, as packet sockets do."""

    def __init__(self) -> None:
        self.far_read, self.reader = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.far_write, self.sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (self.far_read, self.reader, self.far_write, self.sender):
            each.setblocking(False)
            each.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 1 << 20)
        self.buffer = bytearray(400_000)
        self.frames: list[bytes] = []
        self.shell = TunShell(
            self.reader.fileno(),
            self.buffer,
            outbound=lambda length, _: self.frames.append(bytes(self.buffer[:length])),
            flush=lambda _: None,
            clock=lambda: 5.0,
            lost=lambda _: None,
            sender=self.sender.fileno(),
            mac=b"\2\0\0\0\0\1",
        )

    def close(self) -> None:
        self.shell.stop()
        for each in (self.far_read, self.reader, self.far_write, self.sender):
            each.close()


@pytest.fixture
def veth() -> Iterator[Veth]:
    made = Veth()
    yield made
    made.close()


@pytest.mark.asyncio
async def test_the_link_header_is_put_aside_and_offsets_count_from_the_packet_on(veth: Veth) -> None:
    link = bytes(range(14))
    frames = [super_frame(tcp(body(3000), partial=True), GSO), plain(tcp(b"x")), big_frame(body(374_000))]
    for frame in frames:
        high = Header(*HEADER.unpack_from(frame)).pack(ETHERNET)
        veth.far_read.send(high + link + frame[SIZE:])
    veth.shell.start(asyncio.get_running_loop())
    async with asyncio.timeout(10):
        while len(veth.frames) < len(frames):
            await asyncio.sleep(0.001)
    for frame, got in zip(frames, veth.frames, strict=True):
        before, after = HEADER.unpack_from(frame), HEADER.unpack_from(got)
        assert before[:2] + before[3:] == after[:2] + after[3:]  # the header's length is not read
        assert got[SIZE:] == frame[SIZE:]


@pytest.mark.parametrize("version", [4, 6])
def test_a_link_header_is_put_on(veth: Veth, version: int) -> None:
    ends = {} if version == 4 else {"source": "fd00:1::10", "destination": "fd00:2::10"}
    packet = tcp(b"data", **ends)
    veth.shell.write(memoryview(bytearray(plain(packet))))
    kind = b"\x08\x00" if version == 4 else b"\x86\xdd"
    assert veth.far_write.recv(999) == bytes(10) + b"\2\0\0\0\0\1" + b"\2\xce\x5e\0\0\0" + kind + packet


def test_parts_are_written_as_one(veth: Veth) -> None:
    frame = lifted(big_frame(body(150_000)))
    parts = [memoryview(bytearray(frame[:70_000])), memoryview(frame[70_000:])]
    assert veth.shell.join(parts)
    got = veth.far_write.recv(300_000)
    assert got[:SIZE] + got[SIZE + ETHERNET :] == frame


def test_what_is_refused_is_counted_but_for_want_of_memory(
    veth: Veth, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> None:
        def writev(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "writev", writev)

    parts = [memoryview(bytearray(lifted(big_frame(body(150_000)))))]
    refuse(errno.ENOBUFS)
    assert not veth.shell.join(parts)
    assert not veth.shell.dropped
    refuse(errno.ENETDOWN)
    assert veth.shell.join(parts)
    veth.shell.write(parts[0])
    assert veth.shell.dropped == {"tun-write-enetdown": 2}
