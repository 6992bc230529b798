"""IP packets taken apart: untrusted bytes raise `WireError` and nothing else."""

from __future__ import annotations

import contextlib
import random
import struct
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.meshd.checksum import complete, long_sum, ones_sum, quarter_sums, transport_is_right
from crossedge.meshd.packet import (
    UNKNOWN,
    Layout,
    addresses,
    checksum_place,
    dissect,
    is_unicast,
    may_fragment,
    outline,
    source_routed,
    transport_header,
)
from crossedge.wire.errors import WireError
from tests.data_pair import A4, A6, B4, B6, checksum, ip, tcp, udp


def reason(packet: bytes) -> str:
    with pytest.raises(WireError) as caught:
        dissect(packet)
    return caught.value.reason


def test_plain_packets() -> None:
    assert dissect(tcp(b"data")) == Layout(4, 20, 6, False)
    assert dissect(udp(b"data")) == Layout(4, 20, 17, False)
    assert dissect(tcp(b"data", source=A6, destination=B6)) == Layout(6, 40, 6, False)
    assert addresses(udp(b"x")) == bytes([10, 160, 1, 10, 10, 160, 2, 10])
    assert len(addresses(udp(b"x", source=A6, destination=B6))) == 32


def test_bad_packets_have_a_reason_each() -> None:
    good = tcp(b"data")
    assert reason(b"") == "inner-truncated"
    assert reason(good[:19]) == "inner-truncated"
    assert reason(good + b"\0") == "inner-length"
    assert reason(good[:-1]) == "inner-length"
    assert reason(b"\x44" + good[1:]) == "inner-header"
    assert reason(b"\x4f" + good[1:30]) == "inner-header"
    assert reason(b"\x55" + good[1:]) == "inner-version"
    assert reason(b"\x05" + good[1:]) == "inner-version"
    v6 = udp(b"data", source=A6, destination=B6)
    assert reason(v6[:39]) == "inner-truncated"
    assert reason(v6 + b"\0") == "inner-length"
    assert reason(v6[:-1]) == "inner-length"


def test_options_move_the_transport_header() -> None:
    inner = tcp(b"data")[20:]
    packet = bytearray(ip(A4, B4, 6, b"\1\1\1\1" + inner))
    packet[0] = 0x46
    assert dissect(packet) == Layout(4, 24, 6, False)
    assert checksum_place(packet, dissect(packet)) == 24 + 16


def extension(next_header: int, length: int = 8) -> bytes:
    return bytes([next_header, length // 8 - 1]) + bytes(length - 2)


def test_extension_headers_are_followed() -> None:
    inner = udp(b"data", source=A6, destination=B6)[40:]
    chain = extension(43) + extension(60, 24) + extension(17, 16)
    packet = ip(A6, B6, 0, chain + inner)
    layout = dissect(packet)
    assert layout == Layout(6, 40 + 48, 17, False)
    assert transport_header(packet, layout) == 40 + 48 + 8


def test_extension_headers_are_not_followed_for_ever_or_too_far() -> None:
    endless = ip(A6, B6, 0, extension(0) * 40)
    assert dissect(endless).protocol == UNKNOWN
    cut = ip(A6, B6, 0, b"\x11\xff" + bytes(14))
    layout = dissect(cut)
    assert layout.protocol == UNKNOWN
    assert layout.transport <= len(cut)
    assert not checksum_place(cut, layout)
    assert dissect(ip(A6, B6, 60, b"\x11")).protocol == UNKNOWN


def with_options(options: bytes) -> bytes:
    packet = bytearray(udp(b"data"))
    packet[20:20] = options
    packet[0] = 0x45 + len(options) // 4
    return bytes(packet)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (b"", False),
        (bytes(4), False),
        (b"\1\1\1\1", False),
        (b"\x94\4\0\0", False),  # router alert
        (b"\x83\7\4\x0a\0\0\1\0", True),
        (b"\x89\7\4\x0a\0\0\1\0", True),
        (b"\1\x94\4\0\0\x83\7\4\x0a\0\0\1", True),
        (b"\0\x83\7\4", False),  # behind the end
        (b"\x94\0\x83\7", False),
        (b"\1\1\1\x94", False),
    ],
)
def test_source_routes_of_ipv4(options: bytes, expected: bool) -> None:
    assert source_routed(with_options(options)) is expected


@pytest.mark.parametrize(
    ("first", "chain", "expected"),
    [
        (17, b"", False),
        (50, b"whatever", False),
        (43, bytes([17, 0, 0, 0, 0, 0, 0, 0]), False),  # no segments left
        (43, bytes([17, 0, 4, 1, 0, 0, 0, 0]), True),
        (0, bytes([43, 0] + [0] * 6) + bytes([17, 0, 0, 2, 0, 0, 0, 0]), True),
        (60, bytes([60, 1] + [0] * 14) + bytes([43, 0] + [0] * 6) + bytes([17, 0, 9, 255, 0, 0, 0, 0]), True),
        (44, bytes([43, 0, 0, 1, 0, 0, 0, 0]) + bytes([17, 0, 0, 1, 0, 0, 0, 0]), True),
        (44, bytes([43, 0, 0, 9, 0, 0, 0, 0]) + bytes([17, 0, 0, 1, 0, 0, 0, 0]), False),  # a later fragment
        (43, b"\x11\0\0", True),  # cut off
        (0, bytes(8) * 9, True),  # too many to follow
    ],
)
def test_routing_headers_of_ipv6(first: int, chain: bytes, expected: bool) -> None:
    assert source_routed(ip(A6, B6, first, chain)) is expected


def test_fragments_are_told() -> None:
    fragment = ip(A6, B6, 44, bytes([17, 0, 0, 1]) + bytes(20))
    assert dissect(fragment).fragment
    assert not transport_header(fragment, dissect(fragment))
    for field, expected in ((0x2000, True), (0x0005, True), (0x4000, False), (0, False)):
        packet = bytearray(udp(b"data"))
        struct.pack_into("!H", packet, 6, field)
        assert dissect(packet).fragment is expected
        assert may_fragment(packet) is not bool(field & 0x4000)


@settings(derandomize=True, max_examples=400, deadline=None)
@given(st.binary(max_size=120), st.sampled_from([b"", b"\x45", b"\x60", b"\x4f"]))
def test_any_bytes_raise_wire_error_at_most(data: bytes, first: bytes) -> None:
    packet = first + data
    with contextlib.suppress(WireError):
        layout = outline(packet)
        assert layout.transport <= len(packet)
        place = checksum_place(packet, layout)
        assert place + 2 <= len(packet)
        assert transport_header(packet, layout) <= len(packet)
        source_routed(packet)
        dissect(packet)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.1.2.3", True),
        ("223.255.255.255", True),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("fd00::1", True),
        ("ff02::1", False),
        ("::", False),
        ("::1", False),
    ],
)
def test_unicast(address: str, expected: bool) -> None:
    assert is_unicast(ip_address(address).packed) is expected


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.binary(max_size=1500))
def test_sums_are_those_of_rfc_1071(data: bytes) -> None:
    assert ones_sum(data) == checksum(data) % 65535


@pytest.mark.parametrize("size", [599, 600, 601, 721, 722, 1079, 1301, 1348, 1439, 1440, 1441, 61_000])
def test_sums_of_long_packets_too(size: int) -> None:
    for data in (random.Random(size).randbytes(size), b"\xff" * size, bytes(size - 1) + b"\1"):
        assert ones_sum(data) == checksum(data) % 65535


@pytest.mark.parametrize("size", [0, 2, 8190, 8192, 8194, 61_000, 65_534])
def test_one_sum_of_much_data_is_that_of_its_words(size: int) -> None:
    for data in (random.Random(size).randbytes(size), b"\xff" * size, bytes(size)):
        assert long_sum(data) % 65535 == ones_sum(data)


@pytest.mark.parametrize("quarter", [0, 2, 330, 356, 2000])
@pytest.mark.parametrize("rest", [1, 2, 7, 335, 336, 2013])
def test_sums_of_pieces_in_four_parts_are_those_of_the_pieces(quarter: int, rest: int) -> None:
    noise = random.Random(rest)
    sizes = (quarter, quarter, quarter, rest)
    for fill in (noise.randbytes, lambda size: b"\xff" * size, bytes):
        parts = [fill(size) for _ in range(5) for size in sizes]
        whole = [ones_sum(b"".join(parts[at : at + 4])) for at in range(0, len(parts), 4)]
        assert quarter_sums(parts) == whole


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.binary(max_size=600), st.booleans(), st.booleans(), st.integers(0, 10_000))
def test_a_completed_checksum_is_right_and_a_changed_packet_wrong(
    payload: bytes, datagram: bool, v6: bool, flip: int
) -> None:
    make = udp if datagram else tcp
    ends = {"source": A6, "destination": B6} if v6 else {}
    whole, partial = make(payload, **ends), bytearray(make(payload, partial=True, **ends))
    layout = dissect(whole)
    complete(memoryview(partial), layout.transport, checksum_place(whole, layout), udp=layout.protocol == 17)
    assert bytes(partial) == whole
    assert transport_is_right(whole[layout.transport :], addresses(whole), layout.protocol)
    changed = bytearray(whole[layout.transport :])
    changed[flip % len(changed)] ^= 1 << flip % 8
    assert not transport_is_right(changed, addresses(whole), layout.protocol)
