"""Opening superframes: every subset and order, copies and forgeries."""

from __future__ import annotations

import random
import struct
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.meshd.superframe import HEADER
from crossedge.meshd.virtio import Offloads
from crossedge.wire.endpoint import UdpEndpoint
from tests.data_pair import (
    A6,
    ALICE,
    B6,
    NOW,
    Side,
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
    how = data.draw(st.sampled_from(["alone", "trains", "slots", "parted"]))
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
        elif how == "parted":
            bob.take_parted(*received, source=ALICE)
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


def test_chunks_are_put_together_that_come_another_way_than_ours_from_where_the_peer_was_heard() -> None:
    _, bob, datagrams, frame = long_packet()
    other = UdpEndpoint("203.0.113.9", 9)
    bob.link.sources |= {other}
    bob.take(*datagrams, source=other)
    assert bob.packets() == packets_of(frame)
    assert not bob.dropped


@pytest.mark.parametrize("apart", [0, 2048])
def test_a_chunk_of_another_record_among_others_does_not_get_lost(apart: int) -> None:
    alice, bob = pair(size=512)
    frames = frames_of([("long", 1), ("long", 1)])
    alice.read(frames[0])
    first = alice.datagrams()
    alice.read(frames[1])
    second = alice.datagrams()
    assert len(first) == len(second) == 3
    bob.take_trains(first[0], second[1], first[2], source=ALICE, apart=apart)
    assert not bob.written
    bob.take_trains(second[0], first[1], second[2], source=ALICE, apart=apart)
    assert Counter(bob.packets()) == Counter(packet for frame in frames for packet in packets_of(frame))
    assert not bob.dropped


@pytest.mark.parametrize("apart", [0, 2048])
def test_a_record_whose_train_was_read_in_two_parts_is_whole(apart: int) -> None:
    for cut in range(1, 3):
        _, bob, datagrams, frame = long_packet()
        bob.take_trains(*datagrams[:cut], source=ALICE, apart=apart)
        assert not bob.written
        bob.take_trains(*datagrams[cut:], source=ALICE, apart=apart)
        assert bob.packets() == packets_of(frame)
        assert not bob.dropped


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
