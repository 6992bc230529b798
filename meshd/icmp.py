"""The answer to a packet that is too long for its path (RFC 1191, RFC 4443 section 3.2)."""

from __future__ import annotations

from struct import Struct
from typing import Final

from crossedge.meshd.checksum import complement, ones_sum, pseudo_sum
from crossedge.meshd.packet import FRAGMENT_OFFSET, ICMP, ICMPV6, Layout, addresses, is_unicast
from crossedge.meshd.segment import renew_header_checksum

V4_LIMIT: Final = 576  # bytes of an ICMP error (RFC 1812, 4.3.2.3)
V6_LIMIT: Final = 1280  # bytes of an ICMPv6 error: it must pass any path (RFC 4443, 2.4)
HOP_LIMIT: Final = 64
_V4 = Struct("!BBHHHBBH")
_V6 = Struct("!IHBB")
_BODY_V4 = Struct("!BBHHH")
_BODY_V6 = Struct("!BBHI")
_V4_QUERIES: Final = frozenset({0, 8, 13, 14})  # echo, timestamp: ICMP messages that are no errors


def too_big(packet: memoryview, layout: Layout, mtu: int) -> bytes | None:
    """Return "fragmentation needed" or "packet too big" for a packet that is longer than `mtu` bytes.

    It seems to come from the packet's destination: the host would not take it from an address of its own.
    None where no error may be sent: about an error message, a later fragment, or to or from what is no
    single host (RFC 1812, 4.3.2.7).
    """
    both = addresses(packet)
    half = len(both) // 2
    asker, target = both[:half], both[half:]
    if not is_unicast(asker) or not is_unicast(target):
        return None
    body = bytes(packet[layout.transport : layout.transport + 1])
    if layout.version == 4:
        if (packet[6] << 8 | packet[7]) & FRAGMENT_OFFSET:
            return None
        if layout.protocol == ICMP and not (body and body[0] in _V4_QUERIES):
            return None
        return _too_big_v4(bytes(packet[: V4_LIMIT - 28]), mtu, target + asker)
    if layout.protocol == ICMPV6 and not (body and body[0] >= 128):
        return None
    return _too_big_v6(bytes(packet[: V6_LIMIT - 48]), mtu, target + asker)


def _too_big_v4(quoted: bytes, mtu: int, ends: bytes) -> bytes:
    message = bytearray(_BODY_V4.pack(3, 4, 0, 0, mtu) + quoted)
    message[2:4] = complement(ones_sum(message)).to_bytes(2, "big")
    header = _V4.pack(0x45, 0, 20 + len(message), 0, 0, HOP_LIMIT, ICMP, 0)
    answer = bytearray(header + ends + message)
    renew_header_checksum(memoryview(answer), 20)
    return bytes(answer)


def _too_big_v6(quoted: bytes, mtu: int, ends: bytes) -> bytes:
    message = bytearray(_BODY_V6.pack(2, 0, 0, mtu) + quoted)
    total = pseudo_sum(ends, ICMPV6, len(message)) + ones_sum(message)
    message[2:4] = complement(total).to_bytes(2, "big")
    return _V6.pack(0x60000000, len(message), ICMPV6, HOP_LIMIT) + ends + message
