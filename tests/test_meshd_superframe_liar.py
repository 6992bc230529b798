"""Superframes of a peer that lies in its records, under genuine keys."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.meshd.keypair import Keypair
from crossedge.meshd.superframe import FRAME, HEADER, MAGIC, nonce
from crossedge.meshd.virtio import GSO_TYPES
from tests.data_pair import (
    A4,
    A6,
    ALICE,
    B4,
    B6,
    ip,
    keypairs,
    packets_of,
    pair,
    plain,
    super_frame,
    tcp,
    udp,
)


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
