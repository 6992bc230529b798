"""Cutting, mending and joining super-packets: the packets on both sides of it are the same, bit for bit."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.meshd.coalesce import FLOWS, Coalescer
from crossedge.meshd.icmp import too_big
from crossedge.meshd.packet import dissect, transport_header
from crossedge.meshd.segment import fragments, mend, split
from crossedge.meshd.sink import Sink
from crossedge.meshd.virtio import ALL_OFFLOADS, GSO_TYPES, HEADER, SIZE, Header, Offloads
from tests.data_pair import (
    A4,
    A6,
    B4,
    B6,
    checksum,
    ip,
    packets_of,
    partial_frame,
    plain,
    segments,
    super_frame,
    tcp,
    udp,
    unnumbered,
)

few = settings(derandomize=True, max_examples=80, deadline=None)


def super_packet(kind: str, size: int, gso_size: int, flags: int = 0x98, first: int = 65_530) -> bytes:
    """A super-packet's frame with random payload."""
    payload = random.Random(size).randbytes(size)
    ends = {"source": A6, "destination": B6} if kind.endswith("6") else {}
    if kind.startswith("tcp"):
        packet = tcp(payload, partial=True, flags=flags, sequence=2**32 - 5000, identification=first, **ends)
    else:
        packet = udp(payload, partial=True, identification=first, df=False, **ends)
    return super_frame(packet, gso_size)


KINDS = ["tcp4", "tcp6", "udp4", "udp6"]


@few
@given(st.sampled_from(KINDS), st.integers(1, 20_000), st.integers(8, 1300), st.booleans())
def test_split_makes_the_packets_that_a_kernel_would_make(
    kind: str, size: int, gso_size: int, full: bool
) -> None:
    frame = super_packet(kind, size, gso_size)
    packet = memoryview(bytearray(frame[SIZE:]))
    layout = dissect(packet)
    out = memoryview(bytearray(70_000))
    made = []
    for length in split(packet, layout, transport_header(packet, layout), gso_size, out, full=full):
        made += [bytes(out[:length])] if full else segments(partial_frame(bytes(out[:length])))
    assert made == segments(frame)


@few
@given(st.sampled_from(KINDS), st.integers(2, 30), st.integers(8, 900), st.data())
def test_a_mended_run_is_the_same_packets(kind: str, count: int, gso_size: int, data: st.DataObject) -> None:
    size = count * gso_size - data.draw(st.integers(0, gso_size - 1))
    first = data.draw(st.integers(0, count - 1))
    after = data.draw(st.integers(first + 1, count))
    frame = super_packet(kind, size, gso_size)
    whole = frame[SIZE:]
    layout = dissect(whole)
    header = transport_header(whole, layout)
    run = bytearray(whole[:header] + whole[header + first * gso_size : header + after * gso_size])
    mend(memoryview(run), layout, first * gso_size, gso_size, after == count)
    virtio = Header.for_packet(run, layout, frame[1], gso_size, True, 1380)
    assert segments(virtio.pack() + bytes(run)) == segments(frame)[first:after]


def test_a_wrong_checksum_stays_wrong_when_a_run_is_mended() -> None:
    frame = bytearray(super_packet("tcp4", 5000, 1000))
    frame[SIZE + 20 + 16] ^= 0x10
    packet = memoryview(frame)[SIZE : SIZE + 52 + 2000]
    mend(packet, dissect(frame[SIZE:]), 1000, 1000, False)
    with pytest.raises(AssertionError):
        segments(bytes(frame[: SIZE + 2052]))


# --- Fragments and answers ----------------------------------------------------------------------------------


@few
@given(st.integers(1, 4000), st.integers(68, 1400), st.integers(0, 100), st.booleans())
def test_fragments_are_the_packet(size: int, limit: int, offset: int, more: bool) -> None:
    body = random.Random(size).randbytes(size)
    packet = bytearray(ip(A4, B4, 17, body, df=False, identification=77))
    struct.pack_into("!H", packet, 6, offset | (0x2000 if more else 0))
    whole = bytearray(size)
    pieces = fragments(memoryview(packet), limit)
    for number, piece in enumerate(pieces):
        layout = dissect(piece)
        assert len(piece) <= limit
        assert checksum(piece[:20]) == 0xFFFF
        assert piece[4:6] == packet[4:6]
        field = struct.unpack_from("!H", piece, 6)[0]
        assert bool(field & 0x2000) is (more or number < len(pieces) - 1)
        at = ((field & 0x1FFF) - offset) * 8
        whole[at : at + len(piece) - 20] = piece[layout.transport :]
    assert bytes(whole) == body


def test_a_packet_with_options_is_not_fragmented() -> None:
    packet = bytearray(ip(A4, B4, 17, bytes(3000), df=False))
    packet[0] = 0x46
    assert fragments(memoryview(packet), 1000) == []


def test_the_answer_to_a_long_packet() -> None:
    packet = udp(bytes(1352))
    answer = too_big(memoryview(bytearray(packet)), dissect(packet), 1200)
    assert answer is not None
    assert dissect(answer).protocol == 1
    assert checksum(answer[:20]) == checksum(answer[20:]) == 0xFFFF
    assert answer[12:20] == ip_address(B4).packed + ip_address(A4).packed
    assert answer[20:22] == b"\3\4"
    assert struct.unpack_from("!H", answer, 26)[0] == 1200
    assert packet.startswith(answer[28:])
    assert len(answer) <= 576


def test_the_answer_to_a_long_ipv6_packet() -> None:
    packet = udp(bytes(1332), source=A6, destination=B6)
    answer = too_big(memoryview(bytearray(packet)), dissect(packet), 1300)
    assert answer is not None
    assert dissect(answer).protocol == 58
    assert answer[8:40] == ip_address(B6).packed + ip_address(A6).packed
    pseudo = answer[8:40] + struct.pack("!II", len(answer) - 40, 58)
    assert checksum(pseudo + answer[40:]) == 0xFFFF
    assert answer[40:42] == b"\2\0"
    assert struct.unpack_from("!I", answer, 44)[0] == 1300
    assert packet.startswith(answer[48:])
    assert len(answer) <= 1280


@pytest.mark.parametrize(
    "packet",
    [
        ip(A4, B4, 1, b"\3\1" + bytes(1400)),
        ip(A4, "224.0.0.9", 17, bytes(1400)),
        ip("0.0.0.0", B4, 17, bytes(1400)),
        ip(A6, B6, 58, b"\1\0" + bytes(1400)),
        ip(A6, "ff02::1", 17, bytes(1400)),
        ip(A4, B4, 1, b""),
    ],
)
def test_no_answer_where_none_may_be_sent(packet: bytes) -> None:
    assert too_big(memoryview(bytearray(packet)), dissect(packet), 1200) is None


def test_no_answer_about_a_later_fragment_but_about_an_echo() -> None:
    packet = bytearray(udp(bytes(1352)))
    struct.pack_into("!H", packet, 6, 0x4007)
    assert too_big(memoryview(packet), dissect(packet), 1200) is None
    echo = ip(A4, B4, 1, b"\x08\0" + bytes(1400))
    assert too_big(memoryview(bytearray(echo)), dissect(echo), 1200) is not None


# --- Joining ------------------------------------------------------------------------------------------------


def joined(frames: list[bytes], offloads: Offloads = ALL_OFFLOADS) -> list[bytes]:
    """What is written for these frames, which are flushed at the end."""
    written: list[bytes] = []
    coalescer = Coalescer(Sink(lambda frame: written.append(bytes(frame)), offloads))
    for frame in frames:
        packet = frame[SIZE:]
        virtio = Header(*HEADER.unpack_from(frame))
        coalescer.add(memoryview(bytearray(frame)), dissect(packet), virtio)
    coalescer.flush()
    return written


def stream(count: int, size: int = 1000, last: int | None = None, **fields: object) -> list[bytes]:
    """Consecutive TCP packets."""
    return [
        tcp(
            bytes([number]) * (last if last is not None and number == count - 1 else size),
            sequence=1000 + number * size,
            identification=500 + number,
            **fields,
        )
        for number in range(count)
    ]


def flow(count: int, size: int = 100, **fields: object) -> list[bytes]:
    """Datagrams of one flow."""
    return [udp(bytes([number]) * size, identification=500 + number, **fields) for number in range(count)]


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("ends", [{}, {"source": A6, "destination": B6}])
@pytest.mark.parametrize("make", [stream, flow])
def test_a_flow_becomes_one_super_packet(
    make: Callable[..., list[bytes]], ends: dict[str, str], partial: bool
) -> None:
    packets = make(20, **ends)
    frames = (
        [partial_frame(packet) for packet in make(20, partial=True, **ends)]
        if partial
        else [plain(packet) for packet in packets]
    )
    written = joined(frames)
    assert len(written) == 1
    assert written[0][1] in GSO_TYPES
    assert segments(written[0]) == packets


def test_the_last_packet_may_be_shorter_and_pushed() -> None:
    packets = [*stream(5)[:4], tcp(b"end", sequence=5000, identification=504, flags=0x18)]
    more = stream(2, port=40001)
    written = joined([plain(packet) for packet in packets + more])
    assert [len(segments(frame)) for frame in written] == [5, 2]
    assert segments(written[0]) == packets


CHANGES: dict[str, Callable[[bytes, int], bytes]] = {
    "sequence": lambda body, at: tcp(body, sequence=at + 1),
    "syn": lambda body, at: tcp(body, sequence=at, flags=0x12),
    "fin": lambda body, at: tcp(body, sequence=at, flags=0x11),
    "rst": lambda body, at: tcp(body, sequence=at, flags=0x14),
    "urg": lambda body, at: tcp(body, sequence=at, flags=0x30),
    "cwr": lambda body, at: tcp(body, sequence=at, flags=0x90),
    "ece": lambda body, at: tcp(body, sequence=at, flags=0x50),
    "no ack": lambda body, at: tcp(body, sequence=at, flags=0x00),
    "longer": lambda body, at: tcp(body + b"x", sequence=at),
    "empty": lambda _, at: tcp(b"", sequence=at),
    "options": lambda body, at: tcp(body, sequence=at, options=b"\1\1\x08\x0a12345679"),
    "fewer options": lambda body, at: tcp(body, sequence=at, options=b""),
    "ttl": lambda body, at: tcp(body, sequence=at, ttl=63),
    "tos": lambda body, at: tcp(body, sequence=at, tos=3),
    "df": lambda body, at: tcp(body, sequence=at, df=False),
    "protocol": lambda body, _: udp(body),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_not_joined_and_order_is_kept(name: str) -> None:
    first, last = stream(2)[0], tcp(b"z" * 1000, sequence=9000)
    odd = CHANGES[name](b"y" * 1000, 2000)
    written = joined([plain(packet) for packet in (first, odd, last)])
    assert all(not frame[1] for frame in written)
    of_flow = [frame[SIZE:] for frame in written if frame[SIZE + 9] == 6]
    assert of_flow == [packet for packet in (first, odd, last) if packet[9] == 6]


def test_identifications_must_count_up_without_df() -> None:
    packets = stream(6, df=False)
    assert len(joined([plain(packet) for packet in packets])) == 1
    packets[3] = tcp(bytes([3]) * 1000, sequence=4000, identification=9999, df=False)
    assert [segments(frame) for frame in joined([plain(packet) for packet in packets])] == [
        packets[:3],
        packets[3:4],
        packets[4:],
    ]


@pytest.mark.parametrize("make", [stream, flow])
@pytest.mark.parametrize("bad", range(5))
def test_a_wrong_checksum_is_never_turned_into_a_right_one(
    make: Callable[..., list[bytes]], bad: int
) -> None:
    packets = make(5)
    packets[bad] = packets[bad][:-1] + bytes([packets[bad][-1] ^ 1])
    written = joined([plain(packet) for packet in packets])
    assert plain(packets[bad]) in written
    assert [packet for frame in written for packet in segments(frame)] == packets


def test_a_datagram_without_checksum_is_not_joined() -> None:
    packets = [packet[:26] + b"\0\0" + packet[28:] for packet in flow(4)]
    assert [frame[SIZE:] for frame in joined([plain(packet) for packet in packets])] == packets


def test_fragments_and_other_protocols_pass_at_once() -> None:
    fragment = bytearray(udp(b"x" * 64))
    fragment[6] = 0x20
    packets = [bytes(fragment), ip(A4, B4, 1, b"\x08" + bytes(63)), ip(A4, B4, 47, bytes(64))]
    assert [frame[SIZE:] for frame in joined([plain(packet) for packet in packets])] == packets


def test_udp_super_packets_have_at_most_64_datagrams() -> None:
    packets = flow(150)
    written = joined([plain(packet) for packet in packets])
    assert [len(segments(frame)) for frame in written] == [64, 64, 22]


def test_super_packets_stay_within_64_kib() -> None:
    packets = stream(120)
    written = joined([plain(packet) for packet in packets])
    assert [packet for frame in written for packet in segments(frame)] == packets
    assert all(len(frame) <= SIZE + 65_535 for frame in written)
    assert len(written) == 2


def test_flows_in_between_each_other_are_joined_apart_within_a_bound() -> None:
    flows = [stream(6, port=port) for port in range(FLOWS + 3)]
    mixed = [packet for step in zip(*flows[:FLOWS], strict=True) for packet in step]
    assert len(joined([plain(packet) for packet in mixed])) == FLOWS
    mixed = [packet for step in zip(*flows, strict=True) for packet in step]
    written = [packet for frame in joined([plain(packet) for packet in mixed]) for packet in segments(frame)]
    for packets in flows:
        assert [packet for packet in written if packet in packets] == packets


def test_without_offloads_nothing_is_joined_and_checksums_are_whole() -> None:
    for make in (stream, flow):
        frames = [partial_frame(packet) for packet in make(3, partial=True)]
        written = joined(frames, Offloads.named(()))
        assert written == [plain(packet) for packet in make(3)]


@few
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.booleans(), st.booleans()), max_size=40))
def test_joining_changes_no_packet_and_no_order_within_a_flow(
    steps: list[tuple[int, int, bool, bool]],
) -> None:
    at = dict.fromkeys(range(4), 1)
    packets, frames = [], []
    for number, odd, partial, push in steps:
        size = {0: 40, 1: 1000, 2: 0, 3: 700}.get(odd, 500)
        fields: dict[str, object] = {"port": 40000 + number // 2, "identification": at[number] // 10}
        body = bytes([number + 1]) * size
        if number % 2:
            make, fields["flags"], fields["sequence"] = tcp, 0x18 if push else 0x10, at[number]
        else:
            make = udp
        at[number] += size
        packets.append(make(body, **fields))
        frames.append(partial_frame(make(body, partial=True, **fields)) if partial else plain(packets[-1]))
    written = packets_of(*joined(frames))
    packets = [unnumbered(packet) for packet in packets]
    assert sorted(written) == sorted(packets)
    for number in range(4):

        def mine(packet: bytes, number: int = number) -> bool:
            return packet[9] == (6 if number % 2 else 17) and packet[20:22] == struct.pack(
                "!H", 40000 + number // 2
            )

        assert list(filter(mine, written)) == list(filter(mine, packets))
