"""IP packets as the data path needs them: lengths, addresses, where the transport header is.

`dissect` reads untrusted bytes and raises only `WireError`. It does not judge what a router need not judge:
unknown protocols, options and extension headers pass; they only have no transport header that an offload
could be asked for. Reasons are counter names.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from crossedge.wire.errors import WireError

Buffer = bytes | bytearray | memoryview

TCP: Final = 6
UDP: Final = 17
ICMP: Final = 1
ICMPV6: Final = 58
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS = 0, 43, 44, 60  # RFC 8200, 4
UNKNOWN: Final = -1  # no protocol number: a chain of extension headers that was not followed to its end
MAX_EXTENSION_HEADERS: Final = 8  # more are not followed

LOOSE_ROUTE, STRICT_ROUTE = 131, 137  # IPv4 options (RFC 791, 3.1)
END, NO_OPERATION = 0, 1

IPV4_HEADER: Final = 20  # without options (RFC 791)
IPV6_HEADER: Final = 40  # RFC 8200
TCP_HEADER: Final = 20  # without options (RFC 9293)
UDP_HEADER: Final = 8  # RFC 768
PLAIN_IPV4: Final = 0x45  # first byte of a packet without options

CLAIMED: Final = 65_535  # bytes of the longest packet whose IP header states its length

MORE_FRAGMENTS: Final = 0x2000
DONT_FRAGMENT: Final = 0x4000
FRAGMENT_OFFSET: Final = 0x1FFF

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))  # RFC 9293, 3.1

TCP_CHECKSUM: Final = 16  # offsets of the checksum fields in their headers
UDP_CHECKSUM: Final = 6

_V4 = Struct("!B5xHxB")  # version and length of header, fragment, protocol


class Layout(NamedTuple):
    """Where things are in one IP packet; offsets count from the packet's first byte."""

    version: int
    """4 or 6."""
    transport: int
    """Where the transport header begins; for a fragment, the first byte after the IP headers."""
    protocol: int
    """The transport protocol, or `UNKNOWN`."""
    fragment: bool
    """The packet is a part of another: it may have no transport header, and no offload touches it."""


def dissect(packet: Buffer) -> Layout:
    """Return the layout of exactly one untrusted IP packet; raises only `WireError`.

    A packet whose length field differs from its real length is refused, whichever is longer.
    """
    layout = outline(packet)
    if claimed_length(packet) != len(packet):
        raise WireError("inner-length")
    return layout


def outline(packet: Buffer) -> Layout:
    """Return the layout of untrusted bytes that begin with IP headers; raises only `WireError`.

    Nothing is said about the length that the headers claim: a part of a super-packet still has the whole's.
    """
    size = len(packet)
    if size < IPV4_HEADER:
        raise WireError("inner-truncated")
    version = packet[0] >> 4
    if version == 4:
        first, fragment, protocol = _V4.unpack_from(packet)
        header = (first & 15) * 4
        if header < IPV4_HEADER or header > size:
            raise WireError("inner-header")
        return Layout(4, header, protocol, bool(fragment & (MORE_FRAGMENTS | FRAGMENT_OFFSET)))
    if version != 6:
        raise WireError("inner-version")
    if size < IPV6_HEADER:
        raise WireError("inner-truncated")
    return _follow(packet, size, packet[6])


def claimed_length(packet: Buffer) -> int:
    """Return the length in bytes that the IP header of an outlined packet states for the whole packet."""
    if packet[0] >> 4 == 4:
        return packet[2] << 8 | packet[3]
    return IPV6_HEADER + (packet[4] << 8 | packet[5])


def _follow(packet: Buffer, size: int, protocol: int) -> Layout:
    """Walk IPv6 extension headers to the transport header (RFC 8200, 4)."""
    offset = IPV6_HEADER
    for _ in range(MAX_EXTENSION_HEADERS):
        if protocol == FRAGMENT:
            return Layout(6, offset, UNKNOWN, True)
        if protocol not in (HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS):
            return Layout(6, offset, protocol, False)
        if offset + 8 > size:
            break
        protocol, length = packet[offset], (packet[offset + 1] + 1) * 8
        offset += length
        if offset > size:
            break
    return Layout(6, min(offset, size), UNKNOWN, False)


def transport_header(packet: Buffer, layout: Layout) -> int:
    """Return where the payload begins behind a TCP or UDP header; 0 where there is no such whole header."""
    if layout.fragment:
        return 0
    offset = layout.transport
    if layout.protocol == TCP:
        if len(packet) < offset + TCP_HEADER:
            return 0
        header = (packet[offset + 12] >> 4) * 4
        return offset + header if header >= TCP_HEADER and offset + header <= len(packet) else 0
    if layout.protocol == UDP and len(packet) >= offset + UDP_HEADER:
        return offset + UDP_HEADER
    return 0


def checksum_place(packet: Buffer, layout: Layout) -> int:
    """Return where the TCP or UDP checksum field of a packet is; 0 where it has none."""
    if not transport_header(packet, layout):
        return 0
    return layout.transport + (TCP_CHECKSUM if layout.protocol == TCP else UDP_CHECKSUM)


def addresses(packet: Buffer) -> bytes:
    """Return source and destination, packed and joined (8 or 32 bytes), of a packet long enough for both."""
    return bytes(packet[12:20] if packet[0] >> 4 == 4 else packet[8:40])


def source_routed(packet: Buffer) -> bool:
    """Tell whether an outlined packet names further stops, so that its destination may be only the first one.

    That is a source route of IPv4 (RFC 791, 3.1) or a routing header of IPv6 with segments left (RFC 8200,
    4.4). True as well where the IPv6 headers are too many, or too short, to tell.
    """
    if packet[0] >> 4 == 4:
        return _has_route_option(packet[IPV4_HEADER : (packet[0] & 15) * 4])
    offset, kind = IPV6_HEADER, packet[6]
    for _ in range(MAX_EXTENSION_HEADERS):
        if kind not in (HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS):
            return False
        if offset + 8 > len(packet) or (kind == ROUTING and packet[offset + 3]):
            return True
        if kind == FRAGMENT and (packet[offset + 2] << 8 | packet[offset + 3]) >> 3:
            return False  # what follows is no header
        kind, offset = packet[offset], offset + (8 if kind == FRAGMENT else (packet[offset + 1] + 1) * 8)
    return True


def _has_route_option(options: Buffer) -> bool:
    at = 0
    while at < len(options) and options[at] != END:
        if options[at] in (LOOSE_ROUTE, STRICT_ROUTE):
            return True
        if options[at] == NO_OPERATION:
            at += 1
        elif at + 1 < len(options) and options[at + 1] >= 2:
            at += options[at + 1]
        else:
            return False  # the kernel refuses it
    return False


def may_fragment(packet: Buffer) -> bool:
    """Tell whether routers may fragment this packet: IPv4 without "don't fragment" (RFC 791)."""
    return packet[0] >> 4 == 4 and not packet[6] & (DONT_FRAGMENT >> 8)


def is_unicast(address: bytes) -> bool:
    """Tell whether a packed address can be one host's: not multicast, broadcast, loopback or unspecified."""
    if len(address) == 4:
        return address[0] not in (0, 127) and address[0] < 224
    return address[0] != 0xFF and address[:15] != bytes(15)
