"""Cutting trains: what a lossy link leaves of a frame is what the kernel would have cut and lost."""

from __future__ import annotations

import struct

import pytest

from crossedge.lab.trains import (
    ETHERNET,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    NEEDS_CSUM,
    VNET,
    VNET_SIZE,
    checksum_add,
    count,
    keep,
    too_big,
)

MAC = bytes(range(12))
V4 = bytes([10, 0, 0, 1, 10, 0, 0, 2])
V6 = bytes.fromhex("20010db800000000000000000000000120010db8000000000000000000000002")
SIZE = 100


def frame(kind: int, payload: bytes, *, six: bool = False, flags: int = 0x18) -> bytes:
    """Make a super-packet as the kernel hands it over: checksums left to the device."""
    udp = kind == GSO_UDP_L4
    if udp:
        transport = struct.pack("!HHHH", 1000, 2000, 8 + len(payload), 0)
    else:
        transport = struct.pack("!HHIIBBHHH", 1000, 2000, 5_000, 0, 5 << 4, flags, 512, 0, 0)
    length, protocol = len(transport) + len(payload), 17 if udp else 6
    if six:
        ip = struct.pack("!IHBB", 6 << 28, length, protocol, 64) + V6
    else:
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 7, 0x4000, 64, protocol, 0) + V4
        ip = ip[:10] + struct.pack("!H", ~checksum_add(ip) & 0xFFFF) + ip[12:]
    start = ETHERNET + len(ip)
    offset = 6 if udp else 16
    pseudo = checksum_add(V6 if six else V4, protocol + length)
    transport = transport[:offset] + struct.pack("!H", pseudo) + transport[offset + 2 :]
    header = VNET.pack(NEEDS_CSUM, kind, start + len(transport), SIZE if kind else 0, start, offset)
    return header + MAC + (b"\x86\xdd" if six else b"\x08\x00") + ip + transport + payload


def parse(cut: bytes) -> tuple[int, int, bytes, bytes]:
    """Return GSO type, TCP sequence (0 for UDP), TCP flags and payload; every length and sum is checked."""
    flags, kind, _, size, start, offset = VNET.unpack_from(cut)
    assert flags == NEEDS_CSUM
    packet = cut[VNET_SIZE + ETHERNET :]
    head = start - ETHERNET
    if packet[0] >> 4 == 4:
        assert int.from_bytes(packet[2:4], "big") == len(packet)
        assert checksum_add(packet[:20]) == 0xFFFF
        assert packet[6:10] == bytes([0x40, 0, 64, 17 if offset == 6 else 6])
        addresses = packet[12:20]
    else:
        assert int.from_bytes(packet[4:6], "big") == len(packet) - 40
        addresses = packet[8:40]
    transport = packet[head:]
    udp = offset == 6
    pseudo = checksum_add(addresses, (17 if udp else 6) + len(transport))
    assert int.from_bytes(transport[offset : offset + 2], "big") == pseudo
    if udp:
        assert int.from_bytes(transport[4:6], "big") == len(transport)
        payload, sequence, bits = transport[8:], 0, b""
    else:
        payload, sequence, bits = transport[20:], int.from_bytes(transport[4:8], "big"), transport[13:14]
    assert (size == SIZE) == (kind != GSO_NONE)
    assert (len(payload) > SIZE) == (kind != GSO_NONE)
    return kind, sequence, bits, payload


PAYLOAD = bytes(range(256)) + bytes(range(94))  # 350 bytes: packets of 100, 100, 100, 50


@pytest.mark.parametrize(
    ("kind", "six"), [(GSO_UDP_L4, False), (GSO_UDP_L4, True), (GSO_TCPV4, False), (GSO_TCPV6, True)]
)
def test_packets_of_a_train_are_counted(kind: int, six: bool) -> None:
    train = frame(kind, PAYLOAD, six=six)
    head = (40 if six else 20) + (8 if kind == GSO_UDP_L4 else 20)
    assert count(train) == (4, head + SIZE)
    assert count(frame(GSO_NONE, PAYLOAD, six=six))[0] == 1


def test_nothing_lost_leaves_the_frame_alone() -> None:
    train = frame(GSO_TCPV4, PAYLOAD)
    assert keep(train, [True] * 4) == [train]
    assert keep(train, [False] * 4) == []


@pytest.mark.parametrize("six", [False, True])
def test_a_udp_train_without_some_packets_is_a_shorter_train(six: bool) -> None:
    (rest,) = keep(frame(GSO_UDP_L4, PAYLOAD, six=six), [True, False, True, True])
    assert parse(rest) == (GSO_UDP_L4, 0, b"", PAYLOAD[:100] + PAYLOAD[200:])
    (rest,) = keep(frame(GSO_UDP_L4, PAYLOAD, six=six), [False, False, False, True])
    assert parse(rest) == (GSO_NONE, 0, b"", PAYLOAD[300:])


@pytest.mark.parametrize(("kind", "six"), [(GSO_TCPV4, False), (GSO_TCPV6, True)])
def test_a_tcp_super_packet_falls_into_the_runs_between_losses(kind: int, six: bool) -> None:
    runs = keep(frame(kind, PAYLOAD, six=six, flags=0x99), [True, False, True, True])  # CWR, ACK, PSH, FIN
    assert [parse(run) for run in runs] == [
        (GSO_NONE, 5_000, b"\x90", PAYLOAD[:100]),
        (kind, 5_200, b"\x19", PAYLOAD[200:]),
    ]


@pytest.mark.parametrize("six", [False, True])
def test_too_big_is_told_to_the_sender(six: bool) -> None:
    told = too_big(frame(GSO_UDP_L4, PAYLOAD, six=six), 1300)
    assert told is not None
    assert told[VNET_SIZE : VNET_SIZE + 12] == MAC[6:] + MAC[:6]
    packet = told[VNET_SIZE + ETHERNET :]
    if six:
        assert packet[8:40] == V6[16:] + V6[:16]
        assert packet[40] == 2
        assert int.from_bytes(packet[44:48], "big") == 1300
        assert checksum_add(packet[8:], len(packet) - 40 + 58) == 0xFFFF
    else:
        assert checksum_add(packet[:20]) == 0xFFFF
        assert packet[12:20] == V4[4:] + V4[:4]
        assert packet[20:22] == b"\x03\x04"
        assert int.from_bytes(packet[26:28], "big") == 1300
        assert checksum_add(packet[20:]) == 0xFFFF
    assert too_big(told, 1300) is None or six  # no error about an error
