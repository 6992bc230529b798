"""Opening superframes: every subset and order, copies and forgeries, and peers that lie in their records."""

from __future__ import annotations

import random
import struct
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.meshd.keypair import Keypair
from crossedge.meshd.superframe import FRAME, HEADER, MAGIC, nonce
from crossedge.meshd.virtio import GSO_TYPES, Offloads
from crossedge.wire.endpoint import UdpEndpoint
from tests.data_pair import (
    A4,
    A6,
    ALICE,
    B4,
    B6,
    NOW,
    Side,
    ip,
    keypairs,
    packets_of,
    pair,
    partial_frame,
    plain,
    super_frame,
    tcp,
    udp,
)

PATH = 1232
PIECE = 1000  # segment size; a piece is one segment then, so packets can be told one by one


def frames_of(kinds: list[tuple[str, int]]) -> list[bytes]:
    """Frames whose packets all differ."""
    frames = []
    for number, (kind, count) in enumerate(kinds):
        body = random.Random(number).randbytes(count * PIECE - 300)
        port = 1000 + number
        v6 = {"source": A6, "destination": B6}
        if kind == "tso":
            frames.append(super_frame(tcp(body, port=port, partial=True, flags=0x98), PIECE))
        elif kind == "tso6":
            frames.append(super_frame(tcp(body, port=port, partial=True, flags=0x18, **v6), PIECE))
        elif kind == "uso":
            frames.append(super_frame(udp(body, port=port, partial=True), PIECE))
        elif kind == "uso6":
            frames.append(super_frame(udp(body, port=port, partial=True, **v6), PIECE))
        elif kind == "small":
            frames.append(partial_frame(tcp(body[: 40 + count], port=port, partial=True)))
        else:
            frames.append(plain(udp(body[:1352].ljust(1352, b"."), port=port)))
    return frames


@dataclass
class Record:
    """What one record carries, and the datagrams that do."""

    datagrams: list[bytes]
    packets: list[bytes]
    counter: int
    position: int
    gso: bool


def records_of(frames: list[bytes], growth: int = 1) -> list[Record]:
    """Seal each frame in a drain of its own and tell what is in each record."""
    alice, _ = pair(size=PATH)
    alice.link.growth.datagrams = growth
    records = []
    for frame in frames:
        alice.read(frame)
        if growth > 1 and frame[1]:
            records += grown_records(alice.datagrams(), packets_of(frame))
            continue
        datagrams = alice.datagrams()
        packets = packets_of(frame)
        gso = frame[1] != 0
        if not gso or len(packets) == 1:
            records.append(Record(datagrams, packets, HEADER.unpack_from(datagrams[0])[4], 0, gso))
            continue
        assert len(datagrams) == len(packets)
        for position, (datagram, packet) in enumerate(zip(datagrams, packets, strict=True)):
            records.append(Record([datagram], [packet], HEADER.unpack_from(datagram)[4], position, gso))
    return records


def grown_records(datagrams: list[bytes], packets: list[bytes]) -> list[Record]:
    """The records of one super-packet that were let grow: each has some of its packets, in order."""
    by_counter: dict[int, list[bytes]] = {}
    for datagram in datagrams:
        by_counter.setdefault(HEADER.unpack_from(datagram)[4], []).append(datagram)
    records = []
    for counter, parts in by_counter.items():
        _, bob = pair(size=PATH)
        bob.take(*parts, source=ALICE)
        assert [HEADER.unpack_from(part)[1:3] for part in parts] == [
            (i, len(parts)) for i in range(len(parts))
        ]
        records.append(Record(parts, bob.packets(), counter, 0, False))
    assert [packet for record in records for packet in record.packets] == packets
    return records


KINDS = st.lists(
    st.tuples(st.sampled_from(["tso", "tso6", "uso", "uso6", "small", "long"]), st.integers(2, 7)),
    min_size=1,
    max_size=5,
)


def forge(datagram: bytes, how: int, rng: random.Random) -> bytes:
    """Something that an onlooker could make of a datagram."""
    if how == 0:  # another ciphertext
        return datagram[:16] + rng.randbytes(len(datagram) - 16)
    if how == 1:  # one bit
        changed = bytearray(datagram)
        changed[16 + rng.randrange(len(datagram) - 16)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if how == 2:  # cut off
        return datagram[: rng.randrange(17, len(datagram))]
    return datagram + rng.randbytes(rng.randrange(1, 40))  # longer


@settings(derandomize=True, max_examples=250, deadline=None)
@given(KINDS, st.data())
def test_every_subset_in_every_order_delivers_what_arrived_once(
    kinds: list[tuple[str, int]], data: st.DataObject
) -> None:
    frames = frames_of(kinds)
    growth = data.draw(st.sampled_from([1, 1, 2, 4, 64]))
    records = records_of(frames, growth)
    how = data.draw(st.sampled_from(["alone", "trains", "slots"]))
    rng = random.Random(data.draw(st.integers(0, 10**9)))
    genuine = [(number, datagram) for number, record in enumerate(records) for datagram in record.datagrams]
    arriving: list[tuple[int | None, bytes]] = []
    forged: set[int] = set()
    for number, datagram in genuine:
        fate = data.draw(st.integers(0, 9))
        if fate == 0:
            continue  # lost
        arriving.append((number, datagram))
        if fate == 1:
            arriving.append((number, datagram))  # a copy
        if fate == 2 and number not in forged:
            forged.add(number)
            arriving.append((None, forge(datagram, data.draw(st.integers(0, 3)), rng)))
    disorder = data.draw(st.sampled_from([0, 2, 1000]))
    arriving = [
        item for _, item in sorted(enumerate(arriving), key=lambda pair: pair[0] + rng.uniform(0, disorder))
    ]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(arriving)), max_size=3)))
    _, bob = pair(size=PATH)
    delivered: Counter[bytes] = Counter()
    arrived: Counter[bytes] = Counter()
    done: set[int] = set()
    start = 0
    for stop in [*cuts, len(arriving)]:
        wake_up = arriving[start:stop]
        start = stop
        received = [datagram for _, datagram in wake_up]
        if how == "alone":
            bob.take(*received, source=ALICE)
        else:
            bob.take_trains(*received, source=ALICE, apart=2048 if how == "slots" else 0)
        arrived.update(datagram for number, datagram in wake_up if number is not None)
        complete = {
            number
            for number, record in enumerate(records)
            if number not in done and all(arrived[datagram] for datagram in record.datagrams)
        }
        done |= complete
        expected = Counter(packet for number in complete for packet in records[number].packets)
        frames_written = [frame for frame in bob.written if frame[1]]
        got = Counter(bob.packets())
        assert got == expected
        delivered += got
        # Pieces of one super-packet whose counters follow one another came in one frame.
        pieces = sorted(records[number].counter for number in complete if records[number].gso)
        positions = {records[number].counter: records[number].position for number in complete}
        runs = []
        for counter in pieces:
            if runs and runs[-1][-1] == counter - 1 and positions[counter]:
                runs[-1].append(counter)
            else:
                runs.append([counter])
        if growth == 1:
            assert len(frames_written) == sum(len(run) > 1 for run in runs)
    assert all(count == 1 for count in delivered.values())
    assert set(bob.dropped) <= {
        "replay",
        "bad-tag",
        "truncated",
        "chunk-duplicate",
        "chunk-conflict",
        "chunk-malformed",
    }


def test_a_whole_super_packet_comes_as_it_left() -> None:
    for frame in frames_of([("tso", 40), ("tso6", 40), ("uso", 40), ("uso6", 40)]):
        alice, bob = pair(size=PATH)
        alice.read(frame)
        bob.take(*alice.datagrams(), source=ALICE)
        assert bob.written == [frame]


@pytest.mark.parametrize("cut", ["tcp", "tcp6"])
def test_where_the_path_is_smaller_than_a_segment_loss_costs_what_was_lost(cut: str) -> None:
    body = random.Random(1).randbytes(20_000)
    ends = {"source": A6, "destination": B6} if cut == "tcp6" else {}
    frame = super_frame(tcp(body, partial=True, sequence=0, **ends), 1300)
    alice, bob = pair(size=800)
    alice.read(frame)
    datagrams = alice.datagrams()
    header = len(frame) - 10 - len(body)
    stride = 800 - 32 - 8 - header
    lost = {0, 7, 8, len(datagrams) - 1}
    bob.take(*(datagram for number, datagram in enumerate(datagrams) if number not in lost), source=ALICE)
    got = bytearray(len(body))
    for packet in bob.packets():
        at = struct.unpack_from("!I", packet, header - 32 + 4)[0]
        got[at : at + len(packet) - header] = packet[header:]
    expected = bytearray(body)
    for number in lost:
        piece = slice(number * stride, min((number + 1) * stride, len(body)))
        expected[piece] = bytes(len(expected[piece]))
    assert got == expected


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("how", range(4))
@pytest.mark.parametrize("piece", [0, 1, 4, 8])
def test_a_forgery_does_not_part_the_pieces_around_it(piece: int, how: int, before: bool) -> None:
    alice, bob = pair(size=PATH)
    frame = super_frame(tcp(random.Random(5).randbytes(8700), partial=True), PIECE)
    alice.read(frame)
    datagrams = alice.datagrams()
    assert len(datagrams) == 9
    datagrams.insert(piece + (not before), forge(datagrams[piece], how, random.Random(6)))
    bob.take(*datagrams, source=ALICE)
    assert bob.written == [frame]
    assert sum(bob.dropped.values()) == 1


def test_a_failed_open_consumes_no_counter() -> None:
    alice, bob = pair()
    alice.read(plain(udp(b"x")))
    [datagram] = alice.datagrams()
    bob.take(forge(datagram, 0, random.Random(1)), source=ALICE)
    assert not bob.written
    assert bob.session.received == []
    bob.take(datagram, source=ALICE)
    assert bob.packets() == packets_of(plain(udp(b"x")))


def test_a_replayed_run_is_dropped_and_counted() -> None:
    alice, bob = pair()
    alice.read(*frames_of([("tso", 10)]))
    datagrams = alice.datagrams()
    bob.take(*datagrams[3:5], source=ALICE)
    bob.written.clear()
    bob.take(*datagrams, source=ALICE)
    assert len(bob.packets()) == 8
    bob.take(*datagrams, source=ALICE)
    assert bob.packets() == []
    assert bob.dropped == {"replay": 12}
    assert len(bob.session.received) == 2


# --- Records of several datagrams ---------------------------------------------------------------------------


def long_packet() -> tuple[Side, Side, list[bytes], bytes]:
    alice, bob = pair(size=512)
    frame = frames_of([("long", 1)])[0]
    alice.read(frame)
    datagrams = alice.datagrams()
    assert len(datagrams) == 3
    return alice, bob, datagrams, frame


def test_chunks_from_elsewhere_are_not_put_together() -> None:
    _, bob, datagrams, _ = long_packet()
    bob.take(*datagrams, source=UdpEndpoint("203.0.113.9", 9))
    assert not bob.written
    assert bob.dropped == {"chunk-source": 3}


def test_each_of_two_paths_completes_a_record_by_itself() -> None:
    _, bob, datagrams, frame = long_packet()
    other = UdpEndpoint("203.0.113.9", 9)
    bob.link.set_path((ALICE, other))
    bob.take(*datagrams[:2], source=ALICE)
    bob.take(*datagrams[1:], source=other)
    assert not bob.written
    bob.take(datagrams[0], source=other)
    assert bob.packets() == packets_of(frame)
    bob.take(datagrams[2], source=ALICE)
    assert bob.dropped == {"replay": 1}


def test_chunks_do_not_wait_for_ever() -> None:
    _, bob, datagrams, frame = long_packet()
    bob.take(*datagrams[:2], source=ALICE)
    bob.plane.expire(NOW + 0.5)
    bob.plane.expire(NOW + 1.5)
    assert bob.dropped == {"chunk-timeout": 1}
    bob.take(datagrams[2], source=ALICE, now=NOW + 1.6)
    assert not bob.written
    bob.take(*datagrams[:2], source=ALICE, now=NOW + 1.7)
    assert bob.packets() == packets_of(frame)


@pytest.mark.parametrize("order", ["before", "between", "after"])
@pytest.mark.parametrize("forged", range(3))
def test_a_forged_chunk_does_not_keep_a_record_from_opening(order: str, forged: int) -> None:
    _, bob, datagrams, frame = long_packet()
    bad = forge(datagrams[forged], 0, random.Random(2))
    at = {"before": 0, "between": forged + 1, "after": 3}[order]
    bob.take(*datagrams[:at], bad, *datagrams[at:], source=ALICE)
    assert bob.packets() == packets_of(frame)
    bob.take(*datagrams, source=ALICE)
    assert not bob.written


def test_a_record_whose_chunks_were_all_forged_first_still_opens() -> None:
    _, bob, datagrams, frame = long_packet()
    for datagram in datagrams:
        bob.take(forge(datagram, 0, random.Random(3)), source=ALICE)
    bob.take(*datagrams, source=ALICE)
    assert bob.packets() == packets_of(frame)


@pytest.mark.parametrize(("index", "count"), [(0, 0), (1, 0), (0, 65), (3, 255), (2, 2), (255, 2)])
def test_impossible_chunks_are_counted(index: int, count: int) -> None:
    _, bob, datagrams, _ = long_packet()
    changed = datagrams[0][:2] + bytes([index, count]) + datagrams[0][4:]
    bob.take(changed, source=ALICE)
    assert bob.dropped == {"chunk-malformed": 1}


# --- A peer that lies ---------------------------------------------------------------------------------------


class Liar:
    """A peer with genuine keys that seals what it likes."""

    def __init__(self) -> None:
        self.keypair: Keypair = keypairs()[0]
        _, self.bob = pair()

    def record(self, plaintext: bytes, position: int = 0) -> bytes:
        counter = self.keypair.reserve_chunks(1)
        aead = self.keypair.chunks_send
        assert aead is not None
        header = HEADER.pack(MAGIC, position, 1, self.keypair.remote_index, counter)
        return header + aead.encrypt(nonce(counter, 1, position), plaintext, None)

    def frame(
        self, packet: bytes, kind: int = 0, size: int = 0, flags: int = 0, length: int | None = None
    ) -> bytes:
        return FRAME.pack(flags, kind, size, len(packet) if length is None else length) + packet

    def tell(self, *records: bytes) -> dict[str, int]:
        """Let bob read these records; returns what he dropped. A good packet after them still arrives."""
        self.bob.take(*records, source=ALICE)
        written = list(self.bob.written)
        self.bob.written.clear()
        self.bob.take(self.record(self.frame(udp(b"good"))), source=ALICE)
        assert self.bob.packets() == packets_of(plain(udp(b"good")))
        self.bob.written = written
        return self.bob.dropped


SUPER = super_frame(tcp(bytes(5000), partial=True), 1000)[10:]
SUPER6 = super_frame(tcp(bytes(5000), partial=True, source=A6, destination=B6), 1000)[10:]
USUPER = super_frame(udp(bytes(5000), partial=True), 1000)[10:]


@pytest.mark.parametrize(
    ("reason", "packet", "kind", "size", "flags"),
    [
        ("gso-type", SUPER, 3, 1000, 3),
        ("gso-type", SUPER, 0x81, 1000, 3),
        ("gso-type", SUPER, 2, 1000, 3),
        ("gso-protocol", SUPER, 4, 1000, 3),
        ("gso-protocol", SUPER, 5, 1000, 3),
        ("gso-protocol", SUPER6, 1, 1000, 3),
        ("gso-protocol", USUPER, 1, 1000, 3),
        ("gso-size", SUPER, 1, 0, 3),
        ("gso-size", SUPER, 1, 4, 3),
        ("gso-size", SUPER, 1, 1381, 3),
        ("gso-size", udp(b"x", partial=True), 0, 9, 1),
        ("gso-checksum", SUPER, 1, 1000, 2),
        ("frame-flags", SUPER, 1, 1000, 7),
        ("frame-flags", udp(b"x"), 0, 0, 0x80),
        ("checksum-place", ip(A4, B4, 1, b"ping" * 9, df=True), 0, 0, 1),
        ("inner-source", udp(b"x", source=B4), 0, 0, 0),
        ("inner-source", udp(b"x", source="10.160.3.1"), 0, 0, 0),
        ("inner-source", udp(b"x", source="127.0.0.1"), 0, 0, 0),
        ("inner-source", udp(b"x", source="fd00:2::10", destination=B6), 0, 0, 0),
        ("inner-destination", udp(b"x", destination="192.168.1.1"), 0, 0, 0),
        ("inner-destination", udp(b"x", destination="10.160.1.11"), 0, 0, 0),
        ("inner-destination", tcp(b"x", source=A6, destination="fd00:3::1"), 0, 0, 0),
        ("inner-multicast", udp(b"x", destination="224.0.0.251"), 0, 0, 0),
        ("inner-multicast", udp(b"x", destination="255.255.255.255"), 0, 0, 0),
        ("inner-multicast", udp(b"x", source=A6, destination="ff02::1"), 0, 0, 0),
        ("inner-truncated", b"\x45" + bytes(18), 0, 0, 0),
        ("inner-version", b"\x50" + bytes(39), 0, 0, 0),
        ("inner-length", udp(b"x") + b"more", 0, 0, 0),
        ("inner-length", udp(b"xyz")[:-1], 0, 0, 0),
        ("inner-header", b"\x41" + udp(b"x")[1:], 0, 0, 0),
    ],
)
def test_what_a_peer_may_not_use_never_reaches_the_kernel(
    reason: str, packet: bytes, kind: int, size: int, flags: int
) -> None:
    liar = Liar()
    assert liar.tell(liar.record(liar.frame(packet, kind, size, flags))) == {reason: 1}
    assert not liar.bob.written


def test_a_super_packet_from_a_wrong_source_does_not_reach_the_kernel() -> None:
    for source, destination, reason in (
        ("10.160.9.9", B4, "inner-source"),
        (A4, "10.0.0.1", "inner-destination"),
    ):
        liar = Liar()
        whole = super_frame(tcp(bytes(3000), partial=True, source=source, destination=destination), 1000)[10:]
        pieces = [
            liar.record(liar.frame(whole[:52] + bytes(1000), 1, 1000, 1 if number < 2 else 3), number)
            for number in range(3)
        ]
        assert liar.tell(*pieces) == {reason: 1}
        assert not liar.bob.written


def test_lengths_that_do_not_fit_are_counted() -> None:
    liar = Liar()
    good = udp(b"first")
    records = [
        liar.record(liar.frame(good) + liar.frame(good, length=2**31)),
        liar.record(liar.frame(good, length=len(good) + 1)),
        liar.record(liar.frame(good, length=65536 + len(good))),
    ]
    assert liar.tell(*records) == {"frame-length": 3}
    assert liar.bob.packets() == packets_of(plain(good))


def test_padding_and_empty_records_are_no_fault() -> None:
    liar = Liar()
    good = udp(b"first")
    records = [
        liar.record(b""),
        liar.record(bytes(7)),
        liar.record(bytes(900)),
        liar.record(liar.frame(good) + bytes(3)),
        liar.record(liar.frame(udp(b"second")) + bytes(100)),
    ]
    assert liar.tell(*records) == {}
    assert liar.bob.packets() == packets_of(plain(good), plain(udp(b"second")))


@pytest.mark.parametrize(
    ("reason", "plaintext", "position"),
    [
        ("frame-truncated", b"1234567", 3),
        ("frame-position", FRAME.pack(0, 0, 0, 36) + udp(b"12345678"), 1),
        ("gso-type", FRAME.pack(1, 9, 1000, 36) + udp(b"12345678"), 1),
        ("frame-length", FRAME.pack(1, 1, 1000, 99) + SUPER[:1052], 1),
        ("frame-flags", FRAME.pack(9, 1, 1000, 1052) + SUPER[:1052], 1),
        ("inner-version", FRAME.pack(1, 1, 1000, 1052) + b"\x75" + SUPER[1:1052], 1),
        ("inner-truncated", FRAME.pack(1, 1, 1000, 8) + SUPER[:8], 1),
        ("gso-header", FRAME.pack(1, 1, 1000, 40) + SUPER[:40], 1),
        ("gso-size", FRAME.pack(1, 1, 1000, 52) + SUPER[:52], 1),
        ("gso-size", FRAME.pack(1, 1, 0, 1052) + SUPER[:1052], 1),
        ("gso-size", FRAME.pack(1, 5, 900, 1028) + USUPER[:1028], 1),
        ("inner-length", FRAME.pack(1, 1, 1000, 1052) + SUPER[:1052], 5),
        ("inner-length", FRAME.pack(1, 1, 1000, 1052) + SUPER[:1052], 255),
        ("inner-length", FRAME.pack(3, 1, 1000, 6052) + SUPER[:52] + bytes(6000), 0),
    ],
)
def test_a_piece_that_cannot_be_is_counted(reason: str, plaintext: bytes, position: int) -> None:
    liar = Liar()
    dropped = liar.tell(liar.record(plaintext, position))
    assert dropped == {reason: 1}
    assert not liar.bob.written


def test_runs_that_disagree_with_themselves_do_no_harm() -> None:
    piece = FRAME.pack(1, 1, 1000, 1052) + SUPER[:1052]
    last = FRAME.pack(3, 1, 1000, 1052) + SUPER[:1052]
    for bodies in (
        [piece] * 9,  # more payload than the header states
        [last] * 5,
        [piece, last],  # ends too early
        [piece, bytes(len(piece))],  # no headers at all
        [piece, piece[:70]],  # shorter than its headers
        [piece, piece[:60]],
        [piece] * 4 + [last[:1000]],
    ):
        liar = Liar()
        dropped = liar.tell(*(liar.record(body, number) for number, body in enumerate(bodies)))
        assert not set(dropped) - {"inner-length", "frame-length"}
        for packet in liar.bob.packets():
            assert packet[12:20] == SUPER[12:20]


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 4),
            st.sampled_from([0, 1, 4, 5, 3]),
            st.integers(0, 3),
            st.integers(0, 1400),
            st.binary(max_size=90),
            st.sampled_from(["tcp", "udp", "raw"]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_whatever_a_peer_seals_only_clean_frames_are_written(
    lies: list[tuple[int, int, int, int, bytes, str]],
) -> None:
    liar = Liar()
    records = []
    for position, kind, flags, size, body, what in lies:
        packet = (
            body
            if what == "raw"
            else tcp(body * 20, partial=bool(flags & 1))
            if what == "tcp"
            else udp(body * 20, partial=bool(flags & 1))
        )
        records.append(liar.record(liar.frame(packet, kind, size, flags), position))
    liar.tell(*records)
    for frame in liar.bob.written:
        assert frame[1] in {0, *GSO_TYPES}
        packet = frame[10:]
        assert (packet[12:16], packet[16:20]) == (bytes([10, 160, 1, 10]), bytes([10, 160, 2, 10]))


def test_a_device_without_offloads_gets_plain_packets_with_whole_checksums() -> None:
    frames = frames_of([("tso", 5), ("uso", 3), ("tso6", 2), ("small", 3)])
    for names in ((), ("csum",), ("csum", "tso4"), ("csum", "tso4", "tso6")):
        alice, bob = pair(offloads=Offloads.named(names))
        alice.read(*frames)
        bob.take(*alice.datagrams(), source=ALICE)
        allowed = {0} | Offloads.named(names).gso
        assert {frame[1] for frame in bob.written} <= allowed
        if not names:
            assert all(frame[:10] == bytes(10) for frame in bob.written)
        assert bob.packets() == packets_of(*frames)
