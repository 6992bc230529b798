"""Packets through a modelled NAT keep checksums that a receiver accepts, whole or left to an offload."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import pytest

from crossedge.lab.chance import Chance
from crossedge.lab.natkinds import kind
from crossedge.lab.rewrite import ICMP, TCP, UDP, Translator, adjusted
from crossedge.lab.trains import NEEDS_CSUM, VNET, VNET_SIZE, checksum_add

OUTER = "5.1.0.2"
INNER = "192.168.1.2"
FAR = "5.2.0.9"


def box(name: str = "port-restricted-random") -> Translator:
    return Translator(kind(name), [OUTER], "192.168.1.0/24", Chance(1).below)


def ip_packet(protocol: int, source: str, target: str, body: bytes, ttl: int = 63) -> bytes:
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 9, 0, ttl, protocol, 0) + addresses
    return head[:10] + struct.pack("!H", ~checksum_add(head) & 0xFFFF) + head[12:] + body


def segment(
    protocol: int, source: tuple[str, int], target: tuple[str, int], payload: bytes, partial: bool
) -> bytes:
    ports = struct.pack("!HH", source[1], target[1])
    if protocol == UDP:
        body, offset = ports + struct.pack("!HH", 8 + len(payload), 0) + payload, 6
    else:
        body, offset = ports + struct.pack("!IIBBHHH", 1, 2, 0x50, 0x10, 99, 0, 0) + payload, 16
    addresses = socket.inet_aton(source[0]) + socket.inet_aton(target[0])
    pseudo = checksum_add(addresses, protocol + len(body))
    check = pseudo if partial else ~checksum_add(body, pseudo) & 0xFFFF
    body = body[:offset] + struct.pack("!H", check) + body[offset + 2 :]
    header = VNET.pack(NEEDS_CSUM if partial else 0, 0, 0, 0, 20, offset)
    return header + ip_packet(protocol, source[0], target[0], body)


def ends(buffer: bytearray) -> tuple[tuple[str, int], tuple[str, int]]:
    """Return source and destination; the packet's checksums must be right."""
    partial = buffer[0] & NEEDS_CSUM
    packet = bytes(buffer[VNET_SIZE:])
    assert checksum_add(packet[:20]) == 0xFFFF
    body, protocol = packet[20:], packet[9]
    pseudo = checksum_add(packet[12:20], protocol + len(body))
    offset = 6 if protocol == UDP else 16
    if partial:
        assert int.from_bytes(body[offset : offset + 2], "big") == pseudo
    else:
        assert checksum_add(body, pseudo) == 0xFFFF
    ports = struct.unpack_from("!HH", body)
    return (socket.inet_ntoa(packet[12:16]), ports[0]), (socket.inet_ntoa(packet[16:20]), ports[1])


@pytest.mark.parametrize("protocol", [UDP, TCP])
@pytest.mark.parametrize("partial", [False, True])
def test_out_and_back_with_right_checksums(protocol: int, partial: bool) -> None:
    translator = box()
    out = bytearray(segment(protocol, (INNER, 5000), (FAR, 443), b"payload", partial))
    assert translator.translate(out, len(out), 1.0)
    outer, far = ends(out)
    assert (outer[0], far) == (OUTER, (FAR, 443))
    assert out[VNET_SIZE + 8] == 64  # the kernel takes two hops for one router
    back = bytearray(segment(protocol, (FAR, 443), outer, b"answer!", partial))
    assert translator.translate(back, len(back), 2.0)
    assert ends(back) == ((FAR, 443), (INNER, 5000))


def test_udp_without_a_checksum_stays_without() -> None:
    out = bytearray(segment(UDP, (INNER, 5000), (FAR, 443), b"x", False))
    out[VNET_SIZE + 26 : VNET_SIZE + 28] = b"\0\0"
    assert box().translate(out, len(out), 1.0)
    assert out[VNET_SIZE + 26 : VNET_SIZE + 28] == b"\0\0"


def echo(source: str, target: str, kind: int, identifier: int) -> bytearray:
    body = struct.pack("!BBHHH", kind, 0, 0, identifier, 1) + b"ping"
    body = body[:2] + struct.pack("!H", ~checksum_add(body) & 0xFFFF) + body[4:]
    return bytearray(VNET.pack(0, 0, 0, 0, 0, 0) + ip_packet(ICMP, source, target, body))


def test_echo_is_translated_by_its_identifier() -> None:
    translator = box()
    out = echo(INNER, FAR, 8, 77)
    assert translator.translate(out, len(out), 1.0)
    packet = bytes(out[VNET_SIZE:])
    assert packet[12:16] == socket.inet_aton(OUTER)
    assert checksum_add(packet[20:]) == 0xFFFF
    identifier = struct.unpack_from("!H", packet, 24)[0]
    back = echo(FAR, OUTER, 0, identifier)
    assert translator.translate(back, len(back), 1.1)
    assert back[VNET_SIZE + 16 : VNET_SIZE + 20] == socket.inet_aton(INNER)
    assert struct.unpack_from("!H", back, VNET_SIZE + 24)[0] == 77


def test_icmp_errors_reach_who_sent_the_packet() -> None:
    translator = box()
    out = bytearray(segment(UDP, (INNER, 5000), (FAR, 443), b"x" * 20, False))
    assert translator.translate(out, len(out), 1.0)
    quoted = bytes(out[VNET_SIZE:])
    body = struct.pack("!BBHI", 3, 4, 0, 1300) + quoted
    body = body[:2] + struct.pack("!H", ~checksum_add(body) & 0xFFFF) + body[4:]
    error = bytearray(VNET.pack(0, 0, 0, 0, 0, 0) + ip_packet(ICMP, "5.9.9.9", OUTER, body))
    assert translator.translate(error, len(error), 1.1)
    packet = bytes(error[VNET_SIZE:])
    assert checksum_add(packet[:20]) == 0xFFFF
    assert checksum_add(packet[20:]) == 0xFFFF
    assert packet[16:20] == socket.inet_aton(INNER)
    inner = packet[28:]
    assert (inner[12:16], struct.unpack_from("!H", inner, 20)[0]) == (socket.inet_aton(INNER), 5000)
    assert checksum_add(inner[:20]) == 0xFFFF


def test_hairpin_goes_back_inside() -> None:
    translator = box("hairpinning")
    first = bytearray(segment(UDP, (INNER, 5000), (FAR, 443), b"x", False))
    assert translator.translate(first, len(first), 1.0)
    outer, _ = ends(first)
    second = bytearray(segment(UDP, ("192.168.1.3", 6000), outer, b"y", False))
    opened = bytearray(segment(UDP, (INNER, 5000), (OUTER, 6000), b"z", False))
    assert not translator.translate(opened, len(opened), 1.05)  # nobody there yet, but the filter is open
    assert translator.translate(second, len(second), 1.1)
    assert ends(second) == ((OUTER, 6000), (INNER, 5000))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: p[: VNET_SIZE + 12], "not-ipv4"),
        (lambda p: p[:VNET_SIZE] + b"\x60" + p[VNET_SIZE + 1 :], "not-ipv4"),
        (lambda p: p[: VNET_SIZE + 6] + b"\x00\x10" + p[VNET_SIZE + 8 :], "fragment"),
        (lambda p: p[: VNET_SIZE + 9] + b"\x2f" + p[VNET_SIZE + 10 :], "protocol"),
        (lambda p: p[: VNET_SIZE + 24], "short"),
    ],
)
def test_what_cannot_be_translated_is_dropped_and_counted(
    spoil: Callable[[bytes], bytes], reason: str
) -> None:
    translator = box()
    packet = bytearray(spoil(segment(UDP, (INNER, 5000), (FAR, 443), b"x", False)))
    assert not translator.translate(packet, len(packet), 1.0)
    assert translator.dropped == {reason: 1}


def test_unsolicited_packets_are_refused() -> None:
    translator = box()
    packet = bytearray(segment(UDP, (FAR, 443), (OUTER, 5000), b"x", False))
    assert not translator.translate(packet, len(packet), 1.0)
    assert translator.dropped == {"refused": 1}


def test_incremental_checksum_equals_the_full_one() -> None:
    chance = Chance(3)
    for _ in range(200):
        data = bytearray(chance.token(40))
        check = ~checksum_add(data) & 0xFFFF
        old, new = bytes(data[8:16]), chance.token(8)
        data[8:16] = new
        assert adjusted(check, old, new) % 0xFFFF == (~checksum_add(data) & 0xFFFF) % 0xFFFF
