"""Superframes on the wire: the bytes, what shares a datagram, what shares a train."""

from __future__ import annotations

import random

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import BLAKE2s
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.meshd.keypair import REJECT_AFTER_MESSAGES, AeadName
from crossedge.meshd.superframe import FRAME, HEADER, MAGIC, nonce
from crossedge.meshd.train import TRAIN_BYTES, TRAIN_SEGMENTS
from crossedge.meshd.virtio import GSO_TCPV6, GSO_TYPES, GSO_UDP_L4
from tests.data_pair import (
    A6,
    ALICE,
    B6,
    BOB,
    RELAY,
    Side,
    check_crossing,
    crossings,
    keypairs,
    packets_of,
    pair,
    partial_frame,
    plain,
    super_frame,
    tcp,
    udp,
)


def plaintexts(side: Side, keys: object = None) -> list[tuple[int, int, bytes]]:
    """Take what was sent, opened: index, count, plaintext."""
    _, receiver = keypairs()
    aead = receiver.chunks_receive
    assert aead is not None
    opened = []
    for datagram in side.datagrams():
        magic, index, count, remote, counter = HEADER.unpack_from(datagram)
        assert (magic, remote) == (MAGIC, receiver.local_index)
        assert count == 1
        opened.append((index, count, aead.decrypt(nonce(counter, count, index), datagram[16:], None)))
    return opened


def test_golden_datagram() -> None:
    alice, _ = pair()
    alice.read(plain(udp(b"hello")))
    assert [datagram.hex() for datagram in alice.datagrams()] == [
        "ce030001090000000000000000000000"
        "418730e503796b56b3adaa23381fa35398fcfc3f50f7a0cae00705f716abfca8cc5b9924930ff9d0259eabb1d3f0d2e2"
        "e423b2f8b33720862b"
    ]


def test_golden_datagram_by_hand() -> None:
    """The same bytes by another library's KDF and what `docs/protocol.md` says."""
    label = b"crossedge/superframe/v1/aes-256-gcm"
    key = HKDF(algorithm=BLAKE2s(32), length=32, salt=b"a" * 32, info=b"").derive(label)
    packet = udp(b"hello")
    plaintext = bytes([0, 0, 0, 0, len(packet), 0, 0, 0]) + packet
    sealed = AESGCM(key).encrypt(b"\0\1" + bytes(10), plaintext, None)
    alice, _ = pair()
    alice.read(plain(packet))
    assert alice.datagrams() == [b"\xce\3\0\1" + b"\t\0\0\0" + bytes(8) + sealed]


def test_golden_frame() -> None:
    alice, _ = pair()
    packet = udp(b"hello", partial=True)
    alice.read(partial_frame(packet))
    [(index, count, plaintext)] = plaintexts(alice)
    assert (index, count) == (0, 1)
    assert plaintext == bytes.fromhex("0100000021000000") + packet


def test_golden_nonce() -> None:
    assert nonce(0x1122334455667788, 3).hex() == "000300008877665544332211"
    assert nonce(5, 1, 46).hex() == "2e0100000500000000000000"


def test_small_packets_of_a_drain_share_datagrams_and_a_train() -> None:
    alice, _ = pair()
    packets = [udp(bytes([number]) * 64, port=1000 + number) for number in range(100)]
    alice.read(*map(plain, packets))
    [(_, train, segment)] = alice.sent
    assert segment == 1232
    frames = b"".join(plaintext[: len(plaintext) // 100 * 100] for _, _, plaintext in plaintexts(alice))
    assert frames == b"".join(FRAME.pack(0, 0, 0, 92) + packet for packet in packets)
    assert len(train) <= TRAIN_BYTES


def test_nothing_waits_for_another_drain() -> None:
    alice, _ = pair()
    for number in range(3):
        alice.read(plain(udp(bytes([number]))))
        assert len(alice.datagrams()) == 1


def test_records_of_about_the_same_size_are_padded_to_share_a_train() -> None:
    alice, bob = pair()
    packets = [udp(bytes([number]) * size) for number, size in enumerate((1100, 1090, 1060, 1100, 1000))]
    alice.read(*map(plain, packets))
    assert [segment for _, _, segment in alice.sent] == [1168]
    [(_, train, _)] = alice.sent
    assert len(train) == 4 * 1168 + 1068
    bob.take(*alice.datagrams(), source=ALICE)
    assert bob.packets() == packets_of(*map(plain, packets))


def test_a_much_shorter_record_is_not_padded() -> None:
    alice, bob = pair()
    packets = [udp(b"x" * size) for size in (1100, 900, 1100)]
    alice.read(*map(plain, packets))
    assert [(len(train), segment) for _, train, segment in alice.sent] == [(1168 + 968, 1168), (1168, 1168)]
    bob.take(*alice.datagrams(), source=ALICE)
    assert bob.packets() == packets_of(*map(plain, packets))


@pytest.mark.parametrize("size", [600, 1232, 1420, 1452, 8972])
@pytest.mark.parametrize("kind", ["tcp4", "tcp6", "udp4"])
def test_trains_stay_within_their_bounds(size: int, kind: str) -> None:
    alice, bob = pair(size=size)
    payload = random.Random(size).randbytes(61_000)
    ends = {"source": A6, "destination": B6} if kind == "tcp6" else {}
    make, gso_size = (udp, 1000) if kind == "udp4" else (tcp, 1308)
    frame = super_frame(make(payload, partial=True, **ends), gso_size)
    alice.read(frame, frame)
    for _, train, segment in alice.sent:
        assert segment <= size
        assert len(train) <= TRAIN_BYTES
        assert -(-len(train) // segment) <= TRAIN_SEGMENTS
    bob.take(*alice.datagrams(), source=ALICE)
    if kind == "udp4":
        assert bob.packets() == packets_of(frame) * 2
    else:
        assert [frame[10:] for frame in bob.written] == [frame[10:]] * 2
        assert bob.packets() == packets_of(frame) * 2


def test_a_super_packet_of_61_000_bytes_is_one_train() -> None:
    alice, _ = pair(size=1452)
    alice.read(super_frame(tcp(bytes(46 * 1328), partial=True), 1328))
    [(_, train, segment)] = alice.sent
    assert (len(train), segment) == (46 * 1420, 1420)


def test_tcp_is_cut_as_the_path_wants_it() -> None:
    alice, bob = pair(size=1232)
    frame = super_frame(tcp(bytes(range(256)) * 200, partial=True), 1328)
    alice.read(frame)
    [(_, _, segment)] = alice.sent
    assert segment == 1232
    bob.take(*alice.datagrams(), source=ALICE)
    assert bob.written == [frame]


def test_udp_is_cut_between_its_datagrams_only() -> None:
    alice, bob = pair(size=1232)
    frame = super_frame(udp(bytes(range(250)) * 40, partial=True), 250)
    alice.read(frame)
    [(_, _, segment)] = alice.sent
    assert segment == 32 + 8 + 28 + 4 * 250
    lost = alice.datagrams()
    del lost[3]
    bob.take(*lost, source=ALICE)
    packets = packets_of(frame)
    assert bob.packets() == packets[:12] + packets[16:]


def test_datagrams_longer_than_the_path_go_as_records_of_several() -> None:
    alice, bob = pair(size=1232)
    frame = super_frame(udp(bytes(5000), partial=True), 1300)
    alice.read(frame)
    datagrams = alice.datagrams()
    assert [datagram[2:4] for datagram in datagrams[:6]] == [b"\0\2", b"\1\2"] * 3
    assert {len(datagram) for datagram in datagrams[:6]} == {16 + (16 + 8 + 1328) // 2}
    bob.take(*datagrams, source=ALICE)
    assert bob.packets() == packets_of(frame)


@pytest.mark.parametrize("size", [512, 700, 1232])
def test_a_long_packet_spans_datagrams_of_equal_size(size: int) -> None:
    alice, bob = pair(size=size)
    packet = udp(random.Random(size).randbytes(1352))
    alice.read(plain(packet))
    datagrams = alice.datagrams()
    assert len({len(datagram) for datagram in datagrams}) == 1
    assert len(datagrams[0]) <= size
    counters = {HEADER.unpack_from(datagram)[4] for datagram in datagrams}
    assert counters == {0}
    alice.read(plain(udp(b"next")))
    [after] = alice.datagrams()
    assert HEADER.unpack_from(after)[4] == len(datagrams)
    bob.take(*datagrams, after, source=ALICE)
    assert bob.packets() == packets_of(plain(packet), plain(udp(b"next")))


def test_types_that_the_peer_cannot_write_are_cut_here() -> None:
    for gso, frame in (
        (GSO_TYPES - {GSO_UDP_L4}, super_frame(udp(bytes(3000), partial=True), 600)),
        (
            GSO_TYPES - {GSO_TCPV6},
            super_frame(tcp(bytes(3000), partial=True, source=A6, destination=B6), 600),
        ),
        (frozenset[int](), super_frame(tcp(bytes(3000), partial=True, flags=0x98), 600)),
    ):
        alice, _ = pair()
        assert alice.link.agreed is not None
        alice.link.allow_superframes(alice.link.agreed, frozenset(gso), 65_000)
        alice.read(frame)
        kinds, packets = set(), []
        for _, _, plaintext in plaintexts(alice):
            at = 0
            while at + 8 <= len(plaintext):
                flags, kind, _, length = FRAME.unpack_from(plaintext, at)
                if not length:
                    break
                kinds.add((flags, kind))
                packets += packets_of(partial_frame(plaintext[at + 8 : at + 8 + length]))
                at += 8 + length
        assert kinds == {(1, 0)}
        assert packets == packets_of(frame)


def test_the_largest_chunk_of_the_peer_bounds_datagrams() -> None:
    alice, bob = pair(size=9000)
    assert alice.link.agreed is not None
    alice.link.allow_superframes(alice.link.agreed, GSO_TYPES, 1000)
    frame = super_frame(tcp(bytes(9000), partial=True), 1328)
    alice.read(frame, plain(udp(bytes(1300))))
    datagrams = alice.datagrams()
    assert max(map(len, datagrams)) <= 1000
    bob.take(*datagrams, source=ALICE)
    assert bob.packets() == packets_of(frame, plain(udp(bytes(1300))))


def test_both_endpoints_in_doubt_get_the_same_bytes() -> None:
    alice, bob = pair()
    alice.link.set_path((BOB, RELAY), 1232)
    frame = super_frame(tcp(bytes(9000), partial=True), 1328)
    alice.read(frame, plain(udp(b"x")))
    direct = [(train, segment) for endpoint, train, segment in alice.sent if endpoint == BOB]
    relayed = [(train, segment) for endpoint, train, segment in alice.sent if endpoint == RELAY]
    assert direct == relayed
    assert direct
    for train, segment in relayed:
        assert segment + 8 <= 1232
        assert len(train) + 8 * -(-len(train) // segment) <= TRAIN_BYTES
    first = [
        datagram
        for train, segment in direct
        for datagram in (train[at : at + segment] for at in range(0, len(train), segment))
    ]
    alice.sent.clear()
    bob.take(*first, source=ALICE)
    bob.take(
        *(b"\xce\x02" + (0x1234).to_bytes(6, "big") + datagram for datagram in first), source=RELAY.server
    )
    assert bob.packets() == packets_of(frame, plain(udp(b"x")))
    assert bob.dropped == {"replay": len(first)}


@pytest.mark.parametrize("aead", ["aes-256-gcm", "chacha20-poly1305"])
def test_either_aead_works(aead: AeadName) -> None:
    alice, bob = pair(aead=aead)
    frame = super_frame(tcp(bytes(9000), partial=True), 1328)
    alice.read(frame)
    bob.take(*alice.datagrams(), source=ALICE)
    assert bob.packets() == packets_of(frame)


def test_every_bit_of_the_header_is_authenticated() -> None:
    alice, _ = pair()
    alice.read(super_frame(tcp(bytes(9000), partial=True), 1000))
    datagram = alice.datagrams()[4]
    for bit in range(128):
        _, bob = pair()
        changed = bytearray(datagram)
        changed[bit // 8] ^= 1 << bit % 8
        bob.take(bytes(changed), source=ALICE)
        assert not bob.written
        assert bob.session.received == []
        assert sum(bob.dropped.values()) + len(bob.control) + len(bob.plane._inbound._reassembly) == 1


def test_counters_are_never_used_twice_and_end() -> None:
    alice, _ = pair()
    keypair = alice.session.current
    assert keypair is not None
    keypair.chunk_counter = REJECT_AFTER_MESSAGES - 2
    alice.read(plain(udp(b"1")))
    alice.read(super_frame(tcp(bytes(9000), partial=True), 1000))
    assert len(alice.datagrams()) == 1
    assert alice.dropped == {"counter-exhausted": 1}
    alice.read(plain(udp(b"2")))
    alice.read(plain(udp(b"3")))
    assert len(alice.datagrams()) == 1
    assert alice.wanted == ["bob"]


def test_other_keys_open_nothing() -> None:
    alice, _ = pair()
    alice.read(plain(udp(b"x")))
    [datagram] = alice.datagrams()
    sender, _ = keypairs()
    assert sender.chunks_receive is not None
    with pytest.raises(InvalidTag):
        sender.chunks_receive.decrypt(nonce(0, 1), datagram[16:], None)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.integers(512, 1500),
    crossings(1300),
)
def test_whatever_leaves_one_tun_comes_to_the_other(size: int, steps: list[tuple[str, int]]) -> None:
    alice, bob = pair(size=size)
    check_crossing(alice, bob, steps)
