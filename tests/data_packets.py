"""Packets and frames to feed a data path, and what a kernel would make of the frames that it wrote."""

from __future__ import annotations

import struct
from ipaddress import ip_address

from crossedge.meshd.virtio import HEADER

A4, B4 = "10.160.1.10", "10.160.2.10"
A6, B6 = "fd00:1::10", "fd00:2::10"


def checksum(data: bytes) -> int:
    """RFC 1071, word by word."""
    data += bytes(len(data) & 1)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ip(
    source: str,
    destination: str,
    protocol: int,
    payload: bytes,
    *,
    identification: int = 1,
    df: bool = True,
    ttl: int = 64,
    tos: int = 0,
) -> bytes:
    """An IP packet around a transport packet."""
    a, b = ip_address(source), ip_address(destination)
    if a.version == 6:
        return (
            struct.pack("!IHBB", 6 << 28 | tos << 20, len(payload), protocol, ttl)
            + a.packed
            + b.packed
            + payload
        )
    head = struct.pack(
        "!BBHHHBBH4s4s",
        0x45,
        tos,
        20 + len(payload),
        identification,
        0x4000 * df,
        ttl,
        protocol,
        0,
        a.packed,
        b.packed,
    )
    return head[:10] + struct.pack("!H", ~checksum(head) & 0xFFFF) + head[12:] + payload


def pseudo(source: str, destination: str, protocol: int, size: int) -> int:
    return checksum(
        ip_address(source).packed + ip_address(destination).packed + struct.pack("!II", size, protocol)
    )


def with_checksum(source: str, destination: str, protocol: int, transport: bytes, partial: bool) -> bytes:
    """Fill the checksum of a TCP or UDP packet in: whole, or only the pseudo header's."""
    at = 16 if protocol == 6 else 6
    transport = transport[:at] + b"\0\0" + transport[at + 2 :]
    total = pseudo(source, destination, protocol, len(transport))
    if not partial:
        total = checksum(struct.pack("!H", total) + b"\0\0" + transport)
        total = (~total & 0xFFFF) or (0xFFFF if protocol == 17 else 0)
    return transport[:at] + struct.pack("!H", total) + transport[at + 2 :]


def tcp(
    payload: bytes,
    *,
    source: str = A4,
    destination: str = B4,
    sequence: int = 1000,
    flags: int = 0x10,
    options: bytes = b"\1\1\x08\x0a12345678",
    partial: bool = False,
    port: int = 40000,
    **fields: object,
) -> bytes:
    """A TCP packet, with timestamps unless told otherwise."""
    transport = (
        struct.pack(
            "!HHIIBBHHH",
            port,
            5201,
            sequence & 0xFFFFFFFF,
            77,
            (20 + len(options)) // 4 << 4,
            flags,
            512,
            0,
            0,
        )
        + options
        + payload
    )
    return ip(source, destination, 6, with_checksum(source, destination, 6, transport, partial), **fields)


def udp(
    payload: bytes,
    *,
    source: str = A4,
    destination: str = B4,
    partial: bool = False,
    port: int = 40000,
    **fields: object,
) -> bytes:
    """A UDP packet."""
    transport = struct.pack("!HHHH", port, 4433, 8 + len(payload), 0) + payload
    return ip(source, destination, 17, with_checksum(source, destination, 17, transport, partial), **fields)


def plain(packet: bytes) -> bytes:
    """A frame that wants nothing."""
    return bytes(10) + packet


def transport_offset(packet: bytes) -> int:
    return 20 if packet[0] >> 4 == 4 else 40


def partial_frame(packet: bytes) -> bytes:
    """A frame whose transport checksum is partial."""
    at = transport_offset(packet)
    protocol = packet[9] if at == 20 else packet[6]
    return HEADER.pack(1, 0, 0, 0, at, 16 if protocol == 6 else 6) + packet


def super_frame(packet: bytes, gso_size: int) -> bytes:
    """A super-packet's frame; its checksum must be partial."""
    at = transport_offset(packet)
    tcp_inside = (packet[9] if at == 20 else packet[6]) == 6
    kind = 5 if not tcp_inside else 1 if at == 20 else 4
    header = at + ((packet[at + 12] >> 4) * 4 if tcp_inside else 8)
    return HEADER.pack(1, kind, header, gso_size, at, 16 if tcp_inside else 6) + packet


def big_super_frame(payload: bytes, gso_size: int, *, sequence: int = 1000, flags: int = 0x10) -> bytes:
    """A TCP super-packet's frame over IPv4 as Linux makes it beyond 64 KiB: its total length is 0."""
    empty = tcp(b"", sequence=sequence, flags=flags, partial=True)
    size = len(empty) - 20 + len(payload)
    head = empty[:2] + bytes(2) + empty[4:10] + bytes(2) + empty[12:20]
    head = head[:10] + struct.pack("!H", ~checksum(head) & 0xFFFF) + head[12:]
    transport = empty[20:36] + struct.pack("!H", pseudo(A4, B4, 6, size)) + empty[38:]
    return HEADER.pack(1, 1, len(empty), gso_size, 20, 16) + head + transport + payload


def packets_of(*frames: bytes) -> list[bytes]:
    """What these frames are on a wire, IPv4 identifications blanked where "don't fragment" frees them."""
    return [unnumbered(packet) for frame in frames for packet in segments(frame)]


def unnumbered(packet: bytes) -> bytes:
    """Without identification and header checksum, if it is an IPv4 packet that must not be fragmented."""
    if packet[0] >> 4 != 4 or not packet[6] & 0x40:
        return packet
    return packet[:4] + bytes(2) + packet[6:10] + bytes(2) + packet[12:]


def segments(frame: bytes) -> list[bytes]:
    """Cut a frame into the packets that a kernel would make of it, by virtio's rules; checks as it goes."""
    flags, kind, header, gso_size, start, offset = HEADER.unpack_from(frame)
    packet = frame[10:]
    at = transport_offset(packet)
    v4 = at == 20
    assert len(packet) == (
        struct.unpack_from("!H", packet, 2)[0] if v4 else 40 + struct.unpack_from("!H", packet, 4)[0]
    )
    if v4:
        assert checksum(packet[:20]) == 0xFFFF
    if not flags:
        assert (kind, header, gso_size, start, offset) == (0, 0, 0, 0, 0)
        return [packet]
    protocol = packet[9] if v4 else packet[6]
    assert flags == 1
    assert (start, offset) == (at, 16 if protocol == 6 else 6)
    source, destination = (
        (str(ip_address(packet[12:16])), str(ip_address(packet[16:20])))
        if v4
        else (str(ip_address(packet[8:24])), str(ip_address(packet[24:40])))
    )
    assert struct.unpack_from("!H", packet, start + offset)[0] % 65535 == (
        pseudo(source, destination, protocol, len(packet) - at) % 65535
    )
    if not kind:
        header, gso_size = len(packet) if protocol != 6 else at + (packet[at + 12] >> 4) * 4, len(packet)
        header = at + ((packet[at + 12] >> 4) * 4 if protocol == 6 else 8)
    assert header == at + ((packet[at + 12] >> 4) * 4 if protocol == 6 else 8)
    assert kind in {(True, 6): (0, 1), (False, 6): (0, 4)}.get((v4, protocol), (0, 5))
    body = packet[header:]
    cuts = range(0, max(1, len(body)), gso_size)
    made = []
    for number, cut in enumerate(cuts):
        piece = body[cut : cut + gso_size]
        transport = bytearray(packet[at:header] + piece)
        if protocol == 6:
            struct.pack_into(
                "!I", transport, 4, (struct.unpack_from("!I", transport, 4)[0] + cut) & 0xFFFFFFFF
            )
            if number < len(cuts) - 1:
                transport[13] &= ~0x09
            if number:
                transport[13] &= ~0x80
        else:
            struct.pack_into("!H", transport, 4, len(transport))
        whole = with_checksum(source, destination, protocol, bytes(transport), partial=False)
        identification = (struct.unpack_from("!H", packet, 4)[0] + number) & 0xFFFF
        made.append(
            ip(
                source,
                destination,
                protocol,
                whole,
                identification=identification,
                df=bool(packet[6] & 0x40),
                ttl=packet[8],
                tos=packet[1],
            )
            if v4
            else ip(
                source,
                destination,
                protocol,
                whole,
                ttl=packet[7],
                tos=(packet[0] << 8 | packet[1]) >> 4 & 0xFF,
            )
        )
    return made
