"""Transport data of a stock peer: opened in runs it comes to the TUN as it does when opened one by one."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.meshd import stockrun, transport
from crossedge.meshd.inbound import Arrival
from crossedge.meshd.keypair import HEADER, NONCE, Keypair, open_transport
from crossedge.meshd.link import Link
from crossedge.meshd.packet import Layout
from crossedge.meshd.segment import split
from crossedge.meshd.transport import TransportSealer
from tests.data_pair import (
    A6,
    ALICE,
    B6,
    NOW,
    Side,
    keypairs,
    packets_of,
    pair,
    segments,
    super_frame,
    tcp,
    udp,
)

CHECKSUM = 20 + 16  # of TCP in IPv4


def seal(keypair: Keypair, plaintext: bytes) -> bytes:
    """A transport datagram."""
    counter = keypair.reserve()
    header = HEADER.pack(4, keypair.remote_index, counter)
    return header + keypair.send.encrypt(NONCE.pack(counter), plaintext, None)


def spoilt(packet: bytes, error: int) -> bytes:
    """The same TCP packet; the sum of its words is greater by `error`."""
    at = (20 if packet[0] >> 4 == 4 else 40) + 16
    field = (struct.unpack_from("!H", packet, at)[0] + error) % 65535
    return packet[:at] + struct.pack("!H", field) + packet[at + 2 :]


def both(
    batches: list[list[bytes]], *, stock: bool = True, trains: bool = False
) -> tuple[Side, Side, list[stockrun.Run]]:
    """Two receivers that took the same: in runs, and one by one; and the runs."""
    runs: list[stockrun.Run] = []

    def spy(*args: Any) -> stockrun.Run:
        runs.append(stockrun.join_run(*args))
        return runs[-1]

    sides = []
    for joiner in (spy, lambda *_: stockrun.NOTHING):
        _, bob = pair(stock=stock, superframes=False)
        with mock.patch.object(transport, "join_run", joiner):
            for batch in batches:
                (bob.take_trains if trains else bob.take)(*batch, source=ALICE)
        sides.append(bob)
    return sides[0], sides[1], runs


def check_alike(fast: Side, slow: Side) -> None:
    """Everything that both did is the same."""
    assert fast.written == slow.written
    assert fast.dropped == slow.dropped
    assert fast.inner == slow.inner
    assert (fast.link.received, fast.moved) == (slow.link.received, slow.moved)
    one, other = fast.session.current, slow.session.current
    assert one is not None
    assert other is not None
    assert [size for _, size, _ in fast.session.received] == [size for _, size, _ in slow.session.received]
    assert (one.replay.newest, one.replay._words) == (other.replay.newest, other.replay._words)


FLOWS: tuple[dict[str, Any], ...] = (
    {"port": 1000},
    {"port": 1001, "df": False},
    {"port": 1002, "options": b""},
    {"port": 1003, "source": A6, "destination": B6},
    {"port": 1004, "options": bytes([1]) * 40, "df": False},
)
CHANGES = [
    *["none"] * 6,
    *["push", "fin", "syn", "ece", "cwr", "short", "longer", "empty", "gap", "number", "wrong"],
    *["tos", "ttl", "options", "udp", "spoken"],
]
Step = tuple[int, int, int, str]
Fault = tuple[str, int, int]

steps = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([8, 9, 31, 52, 120, 1201]), st.integers(1, 9))
    .flatmap(lambda step: st.tuples(*map(st.just, step), st.sampled_from(CHANGES))),
    min_size=1, max_size=12,
)  # fmt: skip
faults = st.lists(
    st.tuples(
        st.sampled_from(["forge", "copy", "move", "lose", "cut", "split"]),
        st.integers(0, 99),
        st.integers(0, 99),
    ),
    max_size=8,
)


def plaintexts(chosen: list[Step], start: int, padding: int) -> list[bytes]:
    """What a peer's sealer is given: each step is some packets of one flow, the last of them changed."""
    made = []
    sequences, numbers = [start] * len(FLOWS), [start & 0xFFFF] * len(FLOWS)
    noise = random.Random(start)
    errors = 0
    for flow, size, count, change in chosen:
        for left in reversed(range(count)):
            now = "none" if left else change
            size_now = {"short": size - 5, "longer": size + 1, "empty": 0}.get(now, size)
            sequence = sequences[flow] + 3 * (now == "gap")
            fields: dict[str, Any] = {
                "sequence": sequence,
                "identification": (numbers[flow] + (now == "number")) & 0xFFFF,
                "flags": {"push": 0x18, "fin": 0x11, "syn": 0x12, "ece": 0x50, "cwr": 0x90}.get(now, 0x10),
                "tos": 3 if now == "tos" else 0,
                "ttl": 63 if now == "ttl" else 64,
                **FLOWS[flow],
            }
            if now == "options":
                fields["options"] = b"\1\1\x08\x0a12345679"
            packet = tcp(noise.randbytes(size_now), **fields)
            if now == "wrong":
                packet, errors = spoilt(packet, 1 << errors), errors + 1  # powers of two never cancel out
            elif now == "udp":
                packet = udp(noise.randbytes(size), port=1)
            elif now == "spoken":
                packet = b"\0" + noise.randbytes(size)
            made.append(packet + bytes(padding if padding >= 0 else -len(packet) % 16))
            sequences[flow] = sequence + size_now
            numbers[flow] += 1
    return made


def arrivals(datagrams: list[bytes], chosen: list[Fault]) -> list[list[bytes]]:
    """What comes of the datagrams, and in how many wake-ups."""
    batches: list[list[bytes]] = []
    for kind, first, second in chosen:
        if not datagrams:
            break
        at, other = first % len(datagrams), second % len(datagrams)
        if kind == "forge":
            datagram = bytearray(datagrams[at])
            datagram[16 + second % (len(datagram) - 16)] ^= 1
            datagrams[at] = bytes(datagram)
        elif kind == "copy":
            datagrams.insert(other, datagrams[at])
        elif kind == "move":
            datagrams.insert(other, datagrams.pop(at))
        elif kind == "lose":
            del datagrams[at]
        elif kind == "cut":
            datagrams[at] = datagrams[at][: 32 + second % max(1, len(datagrams[at]) - 32)]
        else:
            batches.append(datagrams[:at])
            datagrams = datagrams[at:]
    return [batch for batch in (*batches, datagrams) if batch]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    steps,
    faults,
    st.sampled_from([1000, 0xFFFF_FFFF, 0xFFFF_FFFF - 300, 0xFFF0, 0xFFFF]),
    st.sampled_from([-1, 0, 0, 7, 40]),
    st.booleans(),
    st.booleans(),
)
def test_runs_come_to_the_tun_as_packets_that_are_opened_one_by_one(
    chosen: list[Step], broken: list[Fault], start: int, padding: int, stock: bool, trains: bool
) -> None:
    sender, _ = keypairs()
    batches = arrivals([seal(sender, plain) for plain in plaintexts(chosen, start, padding)], broken)
    fast, slow, _ = both(batches, stock=stock, trains=trains)
    check_alike(fast, slow)
    _, receiver = keypairs()
    alone = []
    for datagram in (datagram for batch in batches for datagram in batch):
        plaintext = open_transport(receiver, datagram)
        if plaintext and plaintext[0] >> 4:
            length = struct.unpack_from("!H", plaintext, 2)[0]
            if plaintext[0] >> 4 == 6:
                length = 40 + struct.unpack_from("!H", plaintext, 4)[0]
            alone += packets_of(bytes(10) + plaintext[:length]) if length <= len(plaintext) else []
    assert sorted(fast.packets()) == sorted(alone)


def stream(count: int, size: int = 1000, **fields: Any) -> list[bytes]:
    """Consecutive TCP packets."""
    return [
        tcp(bytes([n]) * size, sequence=1000 + n * size, identification=n, **fields) for n in range(count)
    ]


@pytest.mark.parametrize("trains", [False, True])
def test_a_super_packet_of_a_stock_peer_is_opened_as_one_run(trains: bool) -> None:
    alice, _ = pair(stock=True, superframes=False, size=1472)
    frame = super_frame(tcp(random.Random(1).randbytes(61_000), partial=True, flags=0x18), 1328)
    alice.read(frame)
    fast, slow, runs = both([alice.datagrams()], trains=trains)
    check_alike(fast, slow)
    assert [run.taken for run in runs if run.taken] == [
        44
    ]  # but for the first, and the last, which is shorter
    assert len(fast.written) == 1
    assert fast.packets() == packets_of(frame)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("size", [8, 1001])
def test_each_kind_of_stream_is_opened_in_runs(flow: dict[str, object], size: int) -> None:
    sender, _ = keypairs()
    fast, slow, runs = both([[seal(sender, packet) for packet in stream(20, size, **flow)]])
    check_alike(fast, slow)
    assert sum(run.taken for run in runs) == 19


@pytest.mark.parametrize(
    "change",
    [
        lambda packet: spoilt(packet, 1),
        lambda packet: packet[:8] + b"\x3f" + packet[9:],
        lambda packet: packet[:3] + bytes([packet[3] ^ 4]) + packet[4:],
        lambda packet: packet[:12] + bytes([10, 160, 9, 9]) + packet[16:],
    ],
    ids=["checksum", "ttl", "length", "source"],
)
def test_what_does_not_belong_in_a_run_is_alone_in_it(change: Callable[[bytes], bytes]) -> None:
    sender, _ = keypairs()
    packets = stream(30)
    packets[14] = change(packets[14])
    fast, slow, runs = both([[seal(sender, packet + bytes(6)) for packet in packets]])
    check_alike(fast, slow)
    assert max(run.taken + run.tried for run in runs) >= 13  # with a wrong checksum none is taken
    assert [len(segments(frame)) for frame in fast.written if len(frame) > 1100] == [14, 15]


def test_a_peer_cannot_make_runs_be_opened_again_and_again() -> None:
    sender, _ = keypairs()
    packets = [spoilt(packet, 1) if n % 2 else packet for n, packet in enumerate(stream(60, 300))]
    fast, slow, runs = both([[seal(sender, packet) for packet in packets]])
    check_alike(fast, slow)
    assert sum(run.tried for run in runs) <= len(packets)


def test_errors_that_cancel_out_are_not_seen_and_the_packets_get_right_checksums() -> None:
    """One sum is taken of a run, which the peer authenticated: what it says so deliberately is its affair."""
    sender, _ = keypairs()
    packets = stream(5)
    wrong = [*packets[:2], spoilt(packets[2], 7), spoilt(packets[3], -7), packets[4]]
    fast, _, _ = both([[seal(sender, packet) for packet in wrong]])
    assert fast.packets() == packets_of(*(bytes(10) + packet for packet in packets))


def test_what_comes_again_and_again_to_the_same_places_is_what_was_sent() -> None:
    """Views of these places are kept; lengths, headers and counts change from one train to the next."""
    sender, _ = keypairs()
    _, bob = pair(stock=True, superframes=False)
    noise, buffer = random.Random(5), bytearray(65_536)
    for number, flow in enumerate(FLOWS * 8):
        count, size = noise.randint(2, 9), noise.choice([300, 300, 311, 500])
        start = number << 16
        packets = [
            tcp(noise.randbytes(size), sequence=start + n * size, identification=n, **flow)
            for n in range(count)
        ]
        datagrams = [seal(sender, packet.ljust(556, b"\0")) for packet in packets]
        segment, train = len(datagrams[0]), b"".join(datagrams)
        buffer[: len(train)] = train
        if number % 2:
            arrivals = [Arrival(0, len(train), segment, ALICE, NOW)]
        else:
            arrivals = [Arrival(n * segment, (n + 1) * segment, segment, ALICE, NOW) for n in range(count)]
        bob.plane.inbound(buffer, arrivals, NOW)
        assert len(bob.written) == 1
        assert bob.packets() == packets_of(*(bytes(10) + packet for packet in packets))
    assert not bob.dropped


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("again", range(0, 40, 13))
def test_forged_and_repeated_datagrams_of_a_train_cost_only_themselves(again: int, trains: bool) -> None:
    sender, _ = keypairs()
    packets = stream(40, 300)
    datagrams = [seal(sender, packet) for packet in packets]
    forged = [*datagrams]
    for n in (0, 1, 17, 39):
        forged[n] = forged[n][:20] + bytes([forged[n][20] ^ 1]) + forged[n][21:]
    fast, slow, _ = both([[datagrams[again]], forged, datagrams], trains=trains)
    check_alike(fast, slow)
    bad = {0, 1, 17, 39} - {again}
    assert fast.dropped == {"bad-tag": len(bad), "replay": 1 + 40 - len(bad)}
    assert sorted(fast.packets()) == sorted(packets_of(*(bytes(10) + packet for packet in packets)))


# --- Sending ------------------------------------------------------------------------------------------------


def one_by_one(
    self: TransportSealer, link: Link, keypair: Keypair, packet: memoryview, layout: Layout, *sizes: int
) -> None:
    """What is done with other packets than many of TCP."""
    for size in split(packet, layout, *sizes, self._view, full=True):
        self._seal(link, keypair, size)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    st.integers(1, 9000),
    st.integers(8, 1400),
    st.sampled_from(FLOWS),
    st.one_of(st.integers(0, 0xFFFF_FFFF), st.integers(0xFFFF_FF00, 0xFFFF_FFFF)),
    st.sampled_from([0x10, 0x18, 0x19, 0x90, 0xD9, 0x50]),
    st.sampled_from([700, 1232, 1420, 1472, 9000]),
    st.integers(0, 3),
)
def test_a_super_packet_is_cut_and_sealed_as_each_packet_would_be(
    length: int, gso_size: int, flow: dict[str, Any], start: int, flags: int, path: int, error: int
) -> None:
    noise = random.Random(length)
    fields: dict[str, Any] = {"sequence": start, "flags": flags, "identification": start & 0xFFFF, **flow}
    frames = [
        super_frame(spoilt(tcp(noise.randbytes(size), partial=True, **fields), error), gso_size)
        for size in (length, 2 * gso_size, length // 2 + 1)
    ]
    sent = []
    for function in (TransportSealer.super_packet, one_by_one):
        alice, _ = pair(stock=True, superframes=False, size=path)
        with mock.patch.object(TransportSealer, "super_packet", function):
            alice.read(*frames)
        assert not alice.dropped
        sent.append((alice.datagrams(), alice.link.sent))
    assert sent[0] == sent[1]
