"""WireGuard transport data: what a stock peer sees of us, and what we make of what it sends."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.meshd.constants import REJECT_AFTER_MESSAGES
from crossedge.meshd.keypair import HEADER, open_transport, seal_transport
from crossedge.meshd.packet import dissect
from crossedge.meshd.train import TRAIN_BYTES, TRAIN_SEGMENTS
from crossedge.meshd.virtio import ALL_OFFLOADS, GSO_TYPES, Offloads
from tests.data_pair import (
    A4,
    A6,
    ALICE,
    B4,
    B6,
    NOW,
    Side,
    check_crossing,
    checksum,
    crossings,
    ip,
    keypairs,
    pair,
    partial_frame,
    plain,
    segments,
    super_frame,
    tcp,
    udp,
    unnumbered,
)


def stock(size: int = 1452, offloads: Offloads = ALL_OFFLOADS) -> tuple[Side, Side]:
    return pair(superframes=False, stock=True, size=size, offloads=offloads)


def opened(side: Side) -> list[bytes]:
    """Take what was sent and open it as a stock peer would: packets, padding cut off, checksums checked."""
    _, receiver = keypairs()
    packets = []
    for datagram in side.datagrams():
        plaintext = open_transport(receiver, datagram)
        assert plaintext is not None
        assert len(plaintext) % 16 == 0 or len(datagram) == side.link.datagram_size
        length = (
            struct.unpack_from("!H", plaintext, 2)[0]
            if plaintext[0] >> 4 == 4
            else 40 + struct.unpack_from("!H", plaintext, 4)[0]
        )
        assert not any(plaintext[length:])
        packets.append(plaintext[:length])
    return packets


def test_golden_message() -> None:
    alice, _ = stock()
    alice.read(plain(udp(b"hello")))
    sender, _ = keypairs()
    assert alice.datagrams() == [seal_transport(sender, udp(b"hello"))]


def test_super_packets_leave_as_packets_with_right_checksums_in_trains() -> None:
    alice, _ = stock()
    body = random.Random(1).randbytes(60_001)
    for frame, segment in (
        (super_frame(tcp(body, partial=True, flags=0x99, identification=65_500), 1328), 1424),
        (super_frame(tcp(body, partial=True, source=A6, destination=B6), 1308), 1424),
        (super_frame(udp(body, partial=True, df=False), 1200), 1264),
        (super_frame(udp(body, partial=True, source=A6, destination=B6), 1100), 1184),
    ):
        alice.read(frame)
        assert alice.sent[0][2] == segment
        for _, train, size in alice.sent:
            assert len(train) <= TRAIN_BYTES
            assert -(-len(train) // size) <= TRAIN_SEGMENTS
        assert opened(alice) == segments(frame)


def test_partial_checksums_are_completed() -> None:
    alice, _ = stock()
    for make in (tcp, udp):
        for ends in ({}, {"source": A6, "destination": B6}):
            alice.read(partial_frame(make(b"odd", partial=True, **ends)))
            assert opened(alice) == [make(b"odd", **ends)]


def test_the_checksum_of_a_tunnel_in_the_tunnel_is_completed_where_the_kernel_says() -> None:
    inside = tcp(b"inside", partial=True, source="192.168.7.1", destination="192.168.7.2")
    outside = udp(b"vxlan..." + inside)
    frame = bytearray(partial_frame(outside))
    struct.pack_into("=HH", frame, 6, 28 + 8 + 20, 16)
    whole = udp(b"vxlan..." + tcp(b"inside", source="192.168.7.1", destination="192.168.7.2"))
    expected = outside[:28] + whole[28:]
    for superframes in (False, True):
        alice, bob = pair(superframes=superframes)
        alice.read(bytes(frame))
        bob.take(*alice.datagrams(), source=ALICE)
        assert bob.written == [plain(expected)]


def test_packets_of_one_size_leave_as_one_train() -> None:
    alice, _ = stock()
    packets = [udp(bytes([number]) * 600) for number in range(80)]
    alice.read(*map(plain, packets))
    assert [-(-len(train) // size) for _, train, size in alice.sent] == [64, 16]
    assert opened(alice) == packets


def test_padding_ends_where_the_path_does() -> None:
    alice, _ = stock(size=1432)
    alice.read(plain(udp(bytes(1372 - 1))))
    [datagram] = alice.datagrams()
    assert len(datagram) == 1432


# --- Too long for the path ----------------------------------------------------------------------------------


def test_a_packet_too_long_for_a_stock_peer_is_answered() -> None:
    alice, _ = stock(size=1232)
    packet = udp(bytes(1300))
    alice.read(plain(packet))
    assert not alice.sent
    [frame] = alice.written
    answer = frame[10:]
    assert dissect(answer).protocol == 1
    assert answer[20:22] == b"\3\4"
    assert struct.unpack_from("!H", answer, 26)[0] == 1200
    assert answer[12:20] == bytes([10, 160, 2, 10, 10, 160, 1, 10])
    assert packet.startswith(answer[28:])
    assert checksum(answer[20:]) == 0xFFFF
    assert alice.dropped == {"outbound-too-big": 1}


def test_an_ipv6_packet_too_long_for_a_stock_peer_is_answered() -> None:
    alice, _ = stock(size=1400)
    alice.read(plain(udp(bytes(1332), source=A6, destination=B6)))
    [frame] = alice.written
    assert frame[10 + 40 : 10 + 42] == b"\2\0"
    assert struct.unpack_from("!I", frame, 10 + 44)[0] == 1368


def test_an_ipv6_host_is_never_told_less_than_1280() -> None:
    alice, _ = stock(size=1232)
    alice.read(plain(udp(bytes(1233), source=A6, destination=B6)))
    [frame] = alice.written
    assert struct.unpack_from("!I", frame, 10 + 44)[0] == 1280


def test_an_ipv6_packet_of_1280_bytes_leaves_on_any_path() -> None:
    alice, _ = stock(size=1232)
    packet = udp(bytes(1232), source=A6, destination=B6)
    alice.read(plain(packet))
    assert opened(alice) == [packet]


def test_a_packet_that_may_be_fragmented_is() -> None:
    alice, bob = stock(size=1232)
    packet = udp(random.Random(4).randbytes(1352), df=False)
    alice.read(partial_frame(udp(random.Random(4).randbytes(1352), df=False, partial=True)))
    bob.take(*alice.datagrams(), source=ALICE)
    pieces = bob.packets()
    assert len(pieces) == 2
    assert b"".join(piece[20:] for piece in pieces) == packet[20:]
    assert not alice.written


def test_answers_are_limited_in_rate() -> None:
    alice, _ = stock(size=1232)
    alice.read(*[plain(udp(bytes(1300)))] * 500)
    first = len(alice.written)
    assert 0 < first <= 50
    alice.read(*[plain(udp(bytes(1300)))] * 500, now=NOW + 0.1)
    assert first < len(alice.written) <= first + 11
    assert alice.dropped["outbound-too-big"] == 1000


def test_tcp_super_packets_fit_any_path() -> None:
    alice, _ = stock(size=1232)
    body = random.Random(3).randbytes(30_000)
    alice.read(super_frame(tcp(body, partial=True), 1328))
    packets = opened(alice)
    assert b"".join(packet[52:] for packet in packets) == body
    assert {len(packet) for packet in packets[:-1]} == {1200}


def test_udp_super_packets_that_do_not_fit_are_answered_once() -> None:
    alice, _ = stock(size=1232)
    alice.read(super_frame(udp(bytes(9000), partial=True), 1300))
    assert not alice.sent
    assert len(alice.written) == 1
    alice.read(super_frame(udp(bytes(9000), partial=True, df=False), 1300))
    assert len(opened(alice)) == 14


def test_before_superframes_are_agreed_long_packets_wait_for_them() -> None:
    alice, bob = pair(superframes=False, size=1232)
    packets = [udp(bytes(1352), port=1), udp(b"short", port=2), udp(bytes(1300), port=3)]
    alice.read(*(partial_frame(udp(packet[28:], port=packet[21], partial=True)) for packet in packets))
    bob.take(*alice.datagrams(), source=ALICE)
    assert bob.packets() == [unnumbered(packets[1])]
    assert len(alice.link.queue) == 2
    assert not alice.written
    keypair = alice.session.current
    assert keypair is not None
    alice.link.allow_superframes(keypair, GSO_TYPES, 65_000)
    alice.plane.flush_queue(alice.link, NOW)
    bob.take(*alice.datagrams(), source=ALICE)
    assert bob.packets() == [unnumbered(packets[0]), unnumbered(packets[2])]
    assert not alice.link.queue


# --- What arrives -------------------------------------------------------------------------------------------


def wrap(*plaintexts: bytes) -> list[bytes]:
    sender, _ = keypairs()
    return [seal_transport(sender, plaintext) for plaintext in plaintexts]


def test_consecutive_packets_come_as_one_super_packet() -> None:
    _, bob = stock()
    packets = [tcp(bytes([number]) * 1328, sequence=number * 1328) for number in range(40)]
    bob.take(*wrap(*packets), source=ALICE)
    assert len(bob.written) == 1
    assert bob.written[0][1] == 1
    assert bob.packets() == [unnumbered(packet) for packet in packets]


def test_packets_out_of_order_in_one_wake_up_are_put_in_order() -> None:
    _, bob = stock()
    packets = [tcp(bytes([number]) * 1328, sequence=number * 1328) for number in range(20)]
    datagrams = wrap(*packets)
    random.Random(1).shuffle(datagrams)
    bob.take(*datagrams, source=ALICE)
    assert len(bob.written) == 1
    assert bob.packets() == [unnumbered(packet) for packet in packets]


def test_a_keepalive_is_told_and_not_written() -> None:
    _, bob = stock()
    bob.take(*wrap(b""), source=ALICE)
    assert bob.session.received == [(NOW, 0, bob.session.current)]
    assert not bob.written
    assert not bob.dropped


def test_in_session_messages_are_handed_on_after_the_session_was_told() -> None:
    _, bob = pair()
    order: list[str] = []
    bob.session.data_received = lambda *_: order.append("session")
    bob.plane._inbound._inner = lambda *said: (order.append("inner"), bob.inner.append(said))
    message = b"\1\0\0\x08" + bytes(4)
    bob.take(*wrap(message, udp(b"x"), message), source=ALICE)
    assert order == ["session", "inner", "inner"]
    assert [said[1] for said in bob.inner] == [message + bytes(8)] * 2
    assert bob.packets() == [unnumbered(udp(b"x"))]


def test_in_session_messages_alone_count_as_no_data() -> None:
    _, bob = pair()
    bob.take(*wrap(b"\1\0\0\x08" + bytes(4)), source=ALICE)
    assert bob.session.received == [(NOW, 0, bob.session.current)]
    assert bob.inner == [("alice", b"\1\0\0\x08" + bytes(12), ALICE, NOW)]


@pytest.mark.parametrize(
    ("reason", "plaintext"),
    [
        ("inner-version", b"\0" * 16),
        ("inner-version", b"\x70" + bytes(60)),
        ("inner-truncated", b"\x45" + bytes(15)),
        ("inner-truncated", b"\x60" + bytes(31)),
        ("inner-length", udp(bytes(100))[:64]),
        ("inner-length", udp(bytes(100), source=A6, destination=B6)[:64]),
        ("inner-source", udp(b"x", source="10.160.7.7")),
        ("inner-source", udp(b"x", source=B4)),
        ("inner-destination", udp(b"x", destination="192.168.1.1")),
        ("inner-multicast", udp(b"x", destination="239.1.1.1")),
    ],
)
def test_what_a_stock_peer_may_not_send_is_counted(reason: str, plaintext: bytes) -> None:
    _, bob = stock()
    bob.take(*wrap(plaintext, udp(b"good")), source=ALICE)
    assert bob.packets() == [unnumbered(udp(b"good"))]
    assert bob.dropped == {reason: 1}


def test_forged_replayed_and_cut_off_messages_are_counted() -> None:
    _, bob = stock()
    first, second = wrap(udp(b"1"), udp(b"2"))
    forged = second[:-1] + bytes([second[-1] ^ 1])
    bob.take(first, first, forged, second[:31], second, source=ALICE)
    assert bob.packets() == [unnumbered(udp(b"1")), unnumbered(udp(b"2"))]
    assert bob.dropped == {"replay": 1, "bad-tag": 1, "truncated": 1}
    bob.take(first, source=ALICE)
    assert bob.dropped["replay"] == 2
    assert len(bob.session.received) == 1


def test_a_wrong_checksum_from_a_stock_peer_stays_wrong() -> None:
    _, bob = stock()
    packets = [tcp(bytes([number]) * 1000, sequence=number * 1000) for number in range(6)]
    packets[3] = packets[3][:-1] + b"!"
    bob.take(*wrap(*packets), source=ALICE)
    assert plain(packets[3]) in bob.written
    assert bob.packets() == [unnumbered(packet) for packet in packets]


def test_fragments_and_extension_headers_pass_untouched() -> None:
    fragment = ip(A4, B4, 17, bytes(64), df=False)
    fragment = fragment[:6] + b"\x20\x05" + fragment[8:]
    extended = ip(A6, B6, 0, bytes([60, 0]) + bytes(6) + bytes([6, 0]) + bytes(6) + bytes(40))
    v6_fragment = ip(A6, B6, 44, bytes([17, 0, 0, 9]) + bytes(40))
    _, bob = stock()
    bob.take(*wrap(fragment, extended, v6_fragment), source=ALICE)
    assert bob.written == [plain(fragment), plain(extended), plain(v6_fragment)]


def test_counters_end() -> None:
    alice, _ = stock()
    keypair = alice.session.current
    assert keypair is not None
    keypair.send_counter = REJECT_AFTER_MESSAGES - 2
    alice.read(super_frame(tcp(bytes(5000), partial=True), 1000))
    assert len(alice.datagrams()) == 2
    assert alice.dropped == {"counter-exhausted": 1}
    alice.read(plain(udp(b"x")))
    assert alice.wanted == ["bob"]


def test_messages_have_the_peers_index_and_growing_counters() -> None:
    alice, _ = stock()
    alice.read(*[plain(udp(bytes([number]))) for number in range(5)])
    heads = [HEADER.unpack_from(datagram) for datagram in alice.datagrams()]
    assert heads == [(4, 9, number) for number in range(5)]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.integers(700, 1500),
    st.booleans(),
    crossings(600),
)
def test_whatever_leaves_one_tun_comes_to_the_other(
    size: int, offloads: bool, steps: list[tuple[str, int]]
) -> None:
    alice, bob = stock(size, ALL_OFFLOADS if offloads else Offloads.named(()))
    check_crossing(alice, bob, steps)
