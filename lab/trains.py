"""Frames as AF_PACKET gives them with a virtio header: how many packets one holds, and how to lose some.

    0         1         2                   4                   6                   8                  10
    +---------+---------+-------------------+-------------------+-------------------+-------------------+
    |  flags  | GSO type|   header length   |    segment size   |   checksum start  |  checksum offset  |
    +---------+---------+-------------------+-------------------+-------------------+-------------------+

(virtio 1.2, section 5.1.6; in the byte order of the machine.) A frame with a GSO type holds many packets
behind one header; a link that loses single packets has to cut it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

VNET = struct.Struct("=BBHHHH")
VNET_SIZE = VNET.size
NEEDS_CSUM = 1
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_UDP_L4 = 5
GSO_ECN = 0x80
ETHERNET = 14
ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_IPV6 = 0x86DD
TCP_FIN_PSH = 0x09
TCP_CWR = 0x80


def checksum_add(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """Return the one's complement sum of 16-bit words (RFC 1071), folded, not inverted."""
    total: int = start + sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1]))
    if len(data) & 1:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def count(frame: bytes | memoryview) -> tuple[int, int]:
    """Return how many packets a frame holds, and the bytes of the largest of them as an IP packet."""
    _, gso_type, _, size, start, _ = VNET.unpack_from(frame)
    gso_type &= ~GSO_ECN
    length = len(frame) - VNET_SIZE
    if gso_type == GSO_NONE or not size:
        return 1, length - ETHERNET
    head = _headers(frame, gso_type, start)
    payload = length - head
    return max(1, -(-payload // size)), head - ETHERNET + min(size, payload)


def _headers(frame: bytes | memoryview, gso_type: int, start: int) -> int:
    """Return the length of all headers, link layer included."""
    if gso_type == GSO_UDP_L4:
        return start + 8
    return start + (frame[VNET_SIZE + start + 12] >> 4) * 4


def keep(frame: bytes, kept: Sequence[bool]) -> list[bytes]:
    """Return the frames that remain when the packets that are not `kept` are lost.

    `kept` has one item per packet of the frame. A UDP train stays one train; a TCP super-packet falls into
    the runs between the losses.
    """
    if all(kept):
        return [frame]
    if not any(kept):
        return []
    flags, gso_type, _, size, start, offset = VNET.unpack_from(frame)
    plain_type = gso_type & ~GSO_ECN
    if plain_type == GSO_NONE:
        return []
    head = _headers(frame, plain_type, start)
    headers = frame[VNET_SIZE : VNET_SIZE + head]
    payload = frame[VNET_SIZE + head :]
    parts = [payload[i * size : (i + 1) * size] for i in range(len(kept))]
    if plain_type == GSO_UDP_L4:
        rest = [part for part, wanted in zip(parts, kept, strict=True) if wanted]
        return [_build(flags, gso_type, size, start, offset, headers, rest, 0, True, True)]
    frames = []
    first = 0
    while first < len(kept):
        if not kept[first]:
            first += 1
            continue
        last = first
        while last + 1 < len(kept) and kept[last + 1]:
            last += 1
        frames.append(
            _build(
                flags,
                gso_type,
                size,
                start,
                offset,
                headers,
                parts[first : last + 1],
                first,
                first == 0,
                last == len(kept) - 1,
            )
        )
        first = last + 1
    return frames


def _build(
    flags: int,
    gso_type: int,
    size: int,
    start: int,
    offset: int,
    headers: bytes,
    parts: list[bytes],
    skipped: int,
    first: bool,
    last: bool,
) -> bytes:
    """Put a run of segments behind headers that fit it."""
    head = bytearray(headers)
    transport_length = len(head) - start + sum(map(len, parts))
    if head[ETHERNET] >> 4 == 4:
        struct.pack_into("!H", head, ETHERNET + 2, start - ETHERNET + transport_length)
        identity = int.from_bytes(head[ETHERNET + 4 : ETHERNET + 6], "big") + skipped
        struct.pack_into("!H", head, ETHERNET + 4, identity & 0xFFFF)
        struct.pack_into("!H", head, ETHERNET + 10, 0)
        struct.pack_into("!H", head, ETHERNET + 10, ~checksum_add(head[ETHERNET:start]) & 0xFFFF)
        pseudo = checksum_add(head[ETHERNET + 12 : ETHERNET + 20], head[ETHERNET + 9])
    else:
        struct.pack_into("!H", head, ETHERNET + 4, start - ETHERNET - 40 + transport_length)
        udp = gso_type & ~GSO_ECN == GSO_UDP_L4
        pseudo = checksum_add(head[ETHERNET + 8 : ETHERNET + 40], 17 if udp else 6)
    if gso_type & ~GSO_ECN == GSO_UDP_L4:
        struct.pack_into("!H", head, start + 4, transport_length)
    else:
        sequence = int.from_bytes(head[start + 4 : start + 8], "big") + skipped * size
        struct.pack_into("!I", head, start + 4, sequence & 0xFFFFFFFF)
        if not last:
            head[start + 13] &= ~TCP_FIN_PSH
        if not first:
            head[start + 13] &= ~TCP_CWR
    if flags & NEEDS_CSUM:
        struct.pack_into("!H", head, start + offset, checksum_add(b"", pseudo + transport_length))
    if len(parts) == 1:
        gso_type, size = GSO_NONE, 0
    header = VNET.pack(flags, gso_type, len(head), size, start, offset)
    return b"".join((header, head, *parts))


def too_big(frame: bytes, mtu: int) -> bytes | None:
    """Return the frame, virtio header included, that tells the sender of `frame` of an MTU.

    ICMP type 3 code 4 (RFC 1191) or ICMPv6 type 2 (RFC 8201), from the address that was sent to; None where
    nothing may be answered (not IP, an ICMP error, not the first fragment).
    """
    ethernet = frame[VNET_SIZE : VNET_SIZE + ETHERNET]
    packet = frame[VNET_SIZE + ETHERNET :]
    kind = int.from_bytes(ethernet[12:14], "big")
    link = VNET.pack(0, 0, 0, 0, 0, 0) + ethernet[6:12] + ethernet[:6] + ethernet[12:14]
    if kind == ETHERTYPE_IPV4 and len(packet) >= 20:
        head = (packet[0] & 15) * 4
        fragment = int.from_bytes(packet[6:8], "big") & 0x1FFF
        error = packet[9] == 1 and len(packet) > head and packet[head] in (3, 5, 11, 12)
        if fragment or error:
            return None
        body = struct.pack("!BBHHH", 3, 4, 0, 0, mtu) + packet[: head + 520]
        body = _with_checksum(body, checksum_add(body))
        answer = struct.pack(
            "!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 0, 0, 64, 1, 0, packet[16:20], packet[12:16]
        )
        total = struct.pack("!H", ~checksum_add(answer) & 0xFFFF)
        return link + answer[:10] + total + answer[12:] + body
    if kind == ETHERTYPE_IPV6 and len(packet) >= 40:
        if packet[6] == 58 and len(packet) > 40 and packet[40] < 128:
            return None
        body = struct.pack("!BBHI", 2, 0, 0, mtu) + packet[:1184]
        answer = struct.pack("!IHBB16s16s", 6 << 28, len(body), 58, 64, packet[24:40], packet[8:24])
        body = _with_checksum(body, checksum_add(answer[8:40] + body, len(body) + 58))
        return link + answer + body
    return None


def _with_checksum(body: bytes, total: int) -> bytes:
    return body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
