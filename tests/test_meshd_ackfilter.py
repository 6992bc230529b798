"""Acknowledgements that a later one makes redundant: which are, and that only those are left out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.meshd.ackfilter import (
    FLOWS_REPEATED,
    LONGEST,
    LONGEST_SELECTIVE,
    STALE,
    Repeats,
    replaces,
    selective,
)
from crossedge.meshd.checksum import ones_sum, pseudo_sum
from crossedge.meshd.keypair import seal_transport
from tests.data_pair import A6, ALICE, B6, keypairs, packets_of, pair, plain, tcp, udp

SACK = b"\1\1\5\x0a" + bytes(8)
HALF = 1 << 31
STAMPS = b"\1\1\x08\x0a12345678"


def ack(number: int, *, six: bool = False, **fields: Any) -> bytes:
    addresses = {"source": A6, "destination": B6} if six else {}
    packet = bytearray(tcp(b"", **addresses, **{"options": STAMPS, **fields}))
    at = 40 if six else 20
    packet[at + 8 : at + 12] = (number % (1 << 32)).to_bytes(4, "big")
    return bytes(packet)


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize("options", [STAMPS, b""])
@pytest.mark.parametrize("number", [1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_later_one_makes_the_one_before_redundant(six: bool, options: bytes, number: int) -> None:
    old = ack(number, six=six, options=options)
    assert len(old) <= LONGEST
    for step in (1, 61_000, (1 << 31) - 1):
        assert replaces(ack(number + step, six=six, options=options), old)
        assert not replaces(old, ack(number + step, six=six, options=options))
    assert not replaces(old, old), "a duplicate acknowledgement says something"


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        {"options": SACK},
        {"flags": 0x18},
        {"flags": 0x11},
        {"flags": 0x50},
        {"port": 40001},
        {"sequence": 1001},
    ],
)
def test_what_says_more_or_is_of_another_flow_stays(six: bool, other: dict[str, Any]) -> None:
    one, another = ack(1000, six=six), ack(500, six=six, **other)
    later = ack(2000, six=six, **other)
    assert not replaces(one, another)
    assert not replaces(later, one)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.booleans(), st.integers(0, 71), st.integers(1, 255))
def test_no_header_byte_but_those_that_may_change_differs(six: bool, place: int, flip: int) -> None:
    old, new = ack(1000, six=six), bytearray(ack(2000, six=six))
    place %= len(new)
    new[place] ^= flip
    at = 40 if six else 20
    may = {7} if six else {4, 5, 8, 10, 11}  # hop limit; identification, time to live, checksum
    may |= {*range(at + 8, at + 12), *range(at + 14, at + 20), *range(at + 24, at + 32)}
    if place not in may:
        assert not replaces(bytes(new), old)


def test_of_a_drain_s_acknowledgements_the_last_leaves_and_all_else_stays_in_order() -> None:
    alice, bob = pair()
    sent = [
        ack(1000),
        ack(2000),
        ack(3000),
        udp(b"between"),
        ack(4000),
        ack(4000),
        ack(5000, options=SACK),
        ack(6000),
        ack(7000),
    ]
    alice.read(*map(plain, sent))
    bob.take(*alice.datagrams(), source=ALICE)
    kept = [sent[n] for n in (2, 3, 4, 5, 6, 8)]
    assert [packet[20:] for packet in bob.packets()] == [packet[20:] for packet in kept]
    assert alice.dropped == {"outbound-ack-superseded": 3}


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("stamps", [STAMPS, b""])
@pytest.mark.parametrize("flags", [0x10, 0x50])
def test_acknowledgements_with_blocks_are_told(six: bool, blocks: int, stamps: bytes, flags: int) -> None:
    options = stamps + bytes((1, 1, 5, 2 + 8 * blocks)) + bytes(8 * blocks)
    packet = ack(1000, six=six, options=options, flags=flags)
    assert len(packet) <= LONGEST_SELECTIVE
    assert selective(packet)
    assert not selective(packet + b"payload.")


@pytest.mark.parametrize(
    "packet",
    [
        ack(1000),
        ack(1000, six=True),
        ack(1000, options=b""),
        ack(1000, options=SACK, flags=0x11),
        ack(1000, options=STAMPS + b"\2\4\5\0" + SACK, flags=0x12),
        udp(bytes(64)),
        udp(b""),
        b"\x46" + ack(1000, options=SACK)[1:],
    ],
)
def test_what_has_no_blocks_or_says_more_is_not_told(packet: bytes) -> None:
    assert not selective(packet)


def test_each_acknowledgement_with_blocks_has_a_datagram_of_its_own() -> None:
    alice, bob = pair()
    sent = [
        ack(1000),
        ack(1000, options=SACK),
        ack(1000, options=STAMPS + SACK),
        udp(b"between"),
        udp(b"them"),
        ack(1000, options=SACK),
    ]
    alice.read(*map(plain, sent))
    datagrams = alice.datagrams()
    assert len(datagrams) == 5
    bob.take(*datagrams, source=ALICE)
    assert [packet[20:] for packet in bob.packets()] == [packet[20:] for packet in sent]
    for lost in (1, 2, 4):
        other, taker = pair()
        other.read(*map(plain, sent))
        several = other.datagrams()
        taker.take(*several[:lost], *several[lost + 1 :], source=ALICE)
        assert len(taker.packets()) == len(sent) - 1


def blocks(number: int, *pairs: tuple[int, int], **fields: Any) -> bytes:
    """Return an acknowledgement that names these blocks, in bytes from its number."""
    edges = b"".join(((number + edge) % (1 << 32)).to_bytes(4, "big") for each in pairs for edge in each)
    options = bytes((1, 1, 5, 2 + len(edges))) + edges
    return ack(number, **{**fields, "options": fields.get("options", STAMPS) + options})


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize("start", [5, (1 << 32) - 3000])
def test_what_a_lost_acknowledgement_named_comes_with_the_next(six: bool, start: int) -> None:
    sent = [blocks(start + n, (9000 + 2000 * n, 10_000 + 2000 * n), six=six) for n in range(5)]
    for lost in range(4):
        alice, bob = pair()
        for packet in sent:
            alice.read(plain(packet))  # each alone, as they come
        datagrams = alice.datagrams()
        assert len(datagrams) == len(sent)
        del datagrams[lost]
        bob.take(*datagrams, source=ALICE)
        got = [packet[20:] for packet in bob.packets()]
        assert [packet[20:] in got for packet in sent] == [True] * 5
        assert sorted(got, key=got.index) == got
        first_seen = [got.index(packet[20:]) for packet in sent]
        assert first_seen == sorted(first_seen)
    assert alice.dropped == {}


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize("options", [STAMPS, b""])
@pytest.mark.parametrize(
    ("pairs", "again"),
    [
        ([(1000, 2000)], True),
        ([(1000, 2000), (5000, 6000), (3000, 4000)], True),
        ([(-2000, -1000)], False),
        ([(-1000, 0), (1000, 2000)], False),
        ([(1000, 2000), (1000, 2000)], False),
        ([(1200, 1800), (1000, 2000), (4000, 5000)], False),
        ([(HALF - 1000, HALF - 1), (1000, 2000)], True),
    ],
)
def test_duplicates_are_reported_once(
    six: bool, options: bytes, pairs: list[tuple[int, int]], again: bool
) -> None:
    repeats = Repeats()
    first, second = blocks(7000, *pairs, six=six, options=options), blocks(8000, (1000, 2000), six=six)
    assert repeats.before(memoryview(first), memoryview(first)) == b""
    assert repeats.before(memoryview(second), memoryview(second)) == (first if again else b"")


@pytest.mark.parametrize(("later", "again"), [(0, True), (STALE - 1, True), (STALE, False), (-1, False)])
def test_nothing_old_is_repeated(later: int, again: bool) -> None:
    repeats = Repeats()
    first, second = blocks(9, (1000, 2000)), blocks(9 + later, (200_000, 201_000))
    repeats.before(memoryview(first), memoryview(first))
    assert repeats.before(memoryview(second), memoryview(second)) == (first if again else b"")


def test_flows_are_kept_apart_and_no_more_than_so_many() -> None:
    repeats = Repeats()
    sent = []
    for number in range(FLOWS_REPEATED + 1):
        packet = bytearray(blocks(9, (1000, 2000)))
        packet[20:22] = (3000 + number).to_bytes(2, "big")
        sent.append(bytes(packet))
        assert repeats.before(memoryview(packet), memoryview(packet)) == b""
    assert repeats.before(memoryview(sent[0]), memoryview(sent[0])) == b""
    assert repeats.before(memoryview(sent[-1]), memoryview(sent[-1])) == sent[-1]


@settings(max_examples=300)
@given(st.binary(max_size=44).map(lambda tail: tail + bytes(-len(tail) % 4)), st.booleans())
def test_any_options_are_read(tail: bytes, six: bool) -> None:
    packet = memoryview(ack(1, six=six, options=tail[:40]))
    repeats = Repeats()
    if selective(packet):
        assert repeats.before(packet, packet) == b""
        assert repeats.before(packet, packet) in {b"", bytes(packet)}


def whole(packet: bytes, error: int = 0) -> bytes:
    """The same packet with a right TCP checksum, or one that is wrong by `error`."""
    at = 40 if packet[0] >> 4 == 6 else 20
    addresses = packet[8:40] if at == 40 else packet[12:20]
    empty = packet[at : at + 16] + bytes(2) + packet[at + 18 :]
    total = pseudo_sum(addresses, 6, len(empty)) + ones_sum(empty)
    return packet[: at + 16] + ((-total + error) % 65535).to_bytes(2, "big") + packet[at + 18 :]


@pytest.mark.parametrize("six", [False, True])
def test_of_a_stock_peer_s_acknowledgements_the_last_right_one_is_written(six: bool) -> None:
    sender, _ = keypairs()
    _, bob = pair(stock=True, superframes=False)
    numbers = [(1000, 0), (2000, 0), (3000, 0), (4000, 5), (5000, 0), (5000, 0), (6000, 0), (7000, 3)]
    packets = [whole(ack(number, six=six), error) for number, error in numbers]
    bob.take(*(seal_transport(sender, packet) for packet in packets), source=ALICE)
    assert bob.packets() == packets_of(*(plain(packets[n]) for n in (2, 4, 6, 7)))
    assert bob.dropped == {"inbound-ack-superseded": 4}
    assert bob.link.received.datagrams == len(packets)
