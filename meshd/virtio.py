"""The virtio network header in front of each packet that a TUN device with IFF_VNET_HDR reads or takes.

     0        1        2                 4                 6                 8                 10
    +--------+--------+-----------------+-----------------+-----------------+-----------------+
    | flags  | type   | header length   | segment size    | checksum start  | checksum offset |
    +--------+--------+-----------------+-----------------+-----------------+-----------------+

in the host's byte order (virtio 1.2, 5.1.6, legacy layout). It asks the kernel for work on the packet: finish
a checksum, cut a super-packet into segments. What a peer sent is never copied into it: `Header.for_packet`
makes it from the parsed packet and refuses what does not fit. The kernel itself would take more, for example
UDP fragmentation, TCP segmentation of a UDP packet and a checksum that is written over the ports.

In the packet sockets of a veth pair the header counts from the Ethernet header on, which lies between it and
the packet.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from typing import Final, NamedTuple

from crossedge.meshd.packet import (
    TCP,
    TCP_CHECKSUM,
    UDP,
    UDP_CHECKSUM,
    Buffer,
    Layout,
    checksum_place,
    transport_header,
)
from crossedge.wire.errors import WireError

HEADER: Final = Struct("=BBHHHH")
SIZE: Final = HEADER.size
ETHERNET: Final = 14  # bytes of an Ethernet header
PLAIN: Final = bytes(SIZE)  # the header of a packet that wants nothing

NEEDS_CHECKSUM: Final = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM

GSO_NONE: Final = 0  # VIRTIO_NET_HDR_GSO_*
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80

GSO_TYPES: Final = frozenset({GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4})
GSO_PROTOCOLS: Final = {  # type, IP version -> the transport protocol that may be segmented so
    (GSO_TCPV4, 4): TCP,
    (GSO_TCPV6, 6): TCP,
    (GSO_UDP_L4, 4): UDP,
    (GSO_UDP_L4, 6): UDP,
}
SMALLEST_SEGMENT: Final = 8  # TCP payload; as Linux's TCP_MIN_GSO_SIZE
UDP_SEGMENTS: Final = 64  # Linux's UDP_MAX_SEGMENTS before 6.9: what every receiver's kernel takes


class Offloads(NamedTuple):
    """What a TUN device takes from us."""

    checksum: bool = True
    """It finishes partial checksums."""
    gso: frozenset[int] = GSO_TYPES
    """Types of super-packets that it cuts."""
    big_tcp: bool = False
    """It is a veth pair: TCP super-packets over IPv4 may be longer than 64 KiB, and offsets count from an
    Ethernet header on."""

    @property
    def link_header(self) -> int:
        """Bytes in front of a packet from which the virtio header's offsets count."""
        return ETHERNET if self.big_tcp else 0

    @classmethod
    def named(cls, names: Iterable[str]) -> Offloads:
        """Return the offloads behind the names `csum`, `tso4`, `tso6`, `uso4`, `uso6` and `big_tcp`.

        Without checksums there is no segmentation, and UDP wants both families (as in the kernel).
        """
        has = set(names)
        if "csum" not in has:
            return cls(checksum=False, gso=frozenset())
        gso = {GSO_TCPV4} if "tso4" in has else set()
        if "tso6" in has:
            gso.add(GSO_TCPV6)
        if {"uso4", "uso6"} <= has:
            gso.add(GSO_UDP_L4)
        return cls(checksum=True, gso=frozenset(gso), big_tcp="big_tcp" in has)


ALL_OFFLOADS: Final = Offloads()


class Header(NamedTuple):
    """One virtio header; sizes and offsets in bytes, offsets from the packet's first byte."""

    flags: int
    gso_type: int
    header_length: int
    gso_size: int
    checksum_start: int
    checksum_offset: int

    def pack(self, before: int = 0) -> bytes:
        """Return the 10 bytes; offsets count from so many bytes in front of the packet."""
        if not before or not self.flags:
            return HEADER.pack(*self)
        flags, gso_type, length, gso_size, start, offset = self
        return HEADER.pack(flags, gso_type, length and length + before, gso_size, start + before, offset)

    @classmethod
    def for_packet(
        cls, packet: Buffer, layout: Layout, gso_type: int, gso_size: int, needs_checksum: bool, largest: int
    ) -> Header:
        """Return the header with which the kernel may take an untrusted packet, or raise `WireError`.

        `largest` bounds one segment with its headers (the interface's MTU), in bytes. A super-packet that is
        no longer than one segment becomes a plain packet.
        """
        if gso_type == GSO_NONE:
            if gso_size:
                raise WireError("gso-size")
            return _plain(packet, layout) if needs_checksum else _NOTHING
        if gso_type not in GSO_TYPES:
            raise WireError("gso-type")
        if GSO_PROTOCOLS.get((gso_type, layout.version)) != layout.protocol:
            raise WireError("gso-protocol")
        if layout.fragment:
            raise WireError("gso-fragment")
        if not needs_checksum:
            raise WireError("gso-checksum")
        header = transport_header(packet, layout)
        if not header:
            raise WireError("gso-header")
        if header + gso_size > largest or gso_size < (SMALLEST_SEGMENT if layout.protocol == TCP else 1):
            raise WireError("gso-size")
        if len(packet) - header <= gso_size:
            return _plain(packet, layout)
        offset = TCP_CHECKSUM if layout.protocol == TCP else UDP_CHECKSUM
        return cls(NEEDS_CHECKSUM, gso_type, header, gso_size, layout.transport, offset)


_NOTHING = Header(0, GSO_NONE, 0, 0, 0, 0)


def _plain(packet: Buffer, layout: Layout) -> Header:
    """Return the header that asks for nothing but the checksum of a whole TCP or UDP packet."""
    place = checksum_place(packet, layout)
    if not place:
        raise WireError("checksum-place")
    return Header(NEEDS_CHECKSUM, GSO_NONE, 0, 0, layout.transport, place - layout.transport)
