"""The virtio header that is written is made from the packet; whatever does not fit is refused by name."""

from __future__ import annotations

import struct

import pytest

from crossedge.meshd.packet import dissect
from crossedge.meshd.virtio import (
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_TYPES,
    GSO_UDP_L4,
    HEADER,
    PLAIN,
    SIZE,
    Header,
    Offloads,
)
from crossedge.wire.errors import WireError
from tests.data_pair import A6, B6, ip, tcp, udp

PAYLOAD = bytes(4000)
SUPERS = {
    "tcp4": (tcp(PAYLOAD, partial=True), GSO_TCPV4),
    "tcp6": (tcp(PAYLOAD, partial=True, source=A6, destination=B6), GSO_TCPV6),
    "udp4": (udp(PAYLOAD, partial=True), GSO_UDP_L4),
    "udp6": (udp(PAYLOAD, partial=True, source=A6, destination=B6), GSO_UDP_L4),
}


def header(packet: bytes, kind: int, size: int, partial: bool = True, largest: int = 1380) -> Header:
    return Header.for_packet(packet, dissect(packet), kind, size, partial, largest)


def refused(packet: bytes, kind: int, size: int, partial: bool = True) -> str:
    with pytest.raises(WireError) as caught:
        header(packet, kind, size, partial)
    return caught.value.reason


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tcp4", (1, 1, 52, 1000, 20, 16)),
        ("tcp6", (1, 4, 72, 1000, 40, 16)),
        ("udp4", (1, 5, 28, 1000, 20, 6)),
        ("udp6", (1, 5, 48, 1000, 40, 6)),
    ],
)
def test_header_of_a_super_packet(name: str, expected: tuple[int, ...]) -> None:
    made = header(*SUPERS[name], 1000)
    assert made == expected
    assert made.pack() == struct.pack("=BBHHHH", *expected)


@pytest.mark.parametrize("name", SUPERS)
def test_a_super_packet_of_one_segment_is_a_plain_packet(name: str) -> None:
    packet, kind = SUPERS[name]
    short = packet[: -len(PAYLOAD)] + bytes(600)
    if name.endswith("4"):
        short = short[:2] + struct.pack("!H", len(short)) + short[4:]
    else:
        short = short[:4] + struct.pack("!H", len(short) - 40) + short[6:]
    assert header(short, kind, 600)[:4] == (1, 0, 0, 0)
    assert header(short, kind, 599)[1] == kind


def test_plain_packets() -> None:
    assert header(tcp(b"x"), 0, 0, partial=False).pack() == PLAIN
    assert header(ip("10.160.1.1", "10.160.2.1", 132, b"sctp" * 5), 0, 0, partial=False).pack() == PLAIN
    assert header(tcp(b"x", partial=True), 0, 0) == (1, 0, 0, 0, 20, 16)
    assert header(udp(b"x", partial=True, source=A6, destination=B6), 0, 0) == (1, 0, 0, 0, 40, 6)


@pytest.mark.parametrize("kind", [2, 3, 6, 0x80, 0x81, 255])
def test_other_types_are_refused(kind: int) -> None:
    assert refused(SUPERS["tcp4"][0], kind, 1000) == "gso-type"


@pytest.mark.parametrize("kind", sorted(GSO_TYPES))
@pytest.mark.parametrize("name", SUPERS)
def test_a_type_fits_one_protocol(name: str, kind: int) -> None:
    packet, right = SUPERS[name]
    if kind != right:
        assert refused(packet, kind, 1000) == "gso-protocol"


@pytest.mark.parametrize("size", [0, 1, 7, 1329, 1380, 9000, 65535])
def test_segment_sizes_are_bounded(size: int) -> None:
    assert refused(*SUPERS["tcp4"], size) == "gso-size"


def test_udp_segments_may_be_short_but_not_empty() -> None:
    assert refused(*SUPERS["udp4"], 0) == "gso-size"
    assert header(*SUPERS["udp4"], 1).gso_size == 1


def test_a_plain_packet_has_no_segment_size() -> None:
    assert refused(tcp(b"x", partial=True), 0, 100) == "gso-size"


def test_segmentation_needs_a_partial_checksum() -> None:
    assert refused(*SUPERS["tcp4"], 1000, partial=False) == "gso-checksum"


def test_no_offload_for_fragments() -> None:
    for field in (0x2000, 0x0001):
        packet = bytearray(SUPERS["tcp4"][0])
        struct.pack_into("!H", packet, 6, field)
        assert refused(bytes(packet), GSO_TCPV4, 1000) == "gso-fragment"
        assert refused(bytes(packet), 0, 0) == "checksum-place"
        assert header(bytes(packet), 0, 0, partial=False).pack() == PLAIN


def test_no_partial_checksum_outside_of_tcp_and_udp() -> None:
    for protocol in (1, 47, 50, 132, 136):
        assert refused(ip("10.160.1.1", "10.160.2.1", protocol, bytes(60)), 0, 0) == "checksum-place"


def test_no_partial_checksum_in_a_header_that_is_cut_off() -> None:
    def packet(protocol: int, transport: bytes) -> bytes:
        return ip("10.160.1.1", "10.160.2.1", protocol, transport)

    assert refused(packet(17, bytes(7)), 0, 0) == "checksum-place"
    assert refused(packet(6, bytes(19)), 0, 0) == "checksum-place"
    assert refused(packet(6, bytes(12) + b"\xf0" + bytes(30)), 0, 0) == "checksum-place"
    assert refused(packet(6, bytes(12) + b"\x40" + bytes(30)), GSO_TCPV4, 9) == "gso-header"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["csum", "tso4", "tso6", "uso4", "uso6"], Offloads()),
        (["csum", "tso4", "tso6"], Offloads(True, frozenset({GSO_TCPV4, GSO_TCPV6}))),
        (["csum", "tso4", "uso4"], Offloads(True, frozenset({GSO_TCPV4}))),
        (["csum"], Offloads(True, frozenset())),
        (["tso4", "tso6", "uso4", "uso6"], Offloads(False, frozenset())),
        ([], Offloads(False, frozenset())),
    ],
)
def test_offloads_by_name(names: list[str], expected: Offloads) -> None:
    assert Offloads.named(names) == expected


def test_header_size() -> None:
    assert SIZE == HEADER.size == 10
