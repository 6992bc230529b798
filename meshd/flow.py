"""What was concluded from a packet's headers, so that the next packet of its flow need not be judged again.

Most packets continue the flow of one before. Everything in a packet that decides whose it is, whether it may
pass, and where its payload begins is read at once, as a key; under it a table has what fresh judgement made
of the first packet with this key. A key has no lengths in it, since those change from packet to packet: they
are checked each time, and a packet that does not plainly pass is judged afresh. Only what was found good is
remembered, and only where nothing else than the key decides: IPv4 without options, IPv6 without extension
headers. Ports, sequence numbers and payloads decide nothing, so all TCP flows between two addresses share
what is concluded.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Any, Final, NamedTuple

from crossedge.meshd.keypair import Keypair
from crossedge.meshd.link import Link
from crossedge.meshd.packet import (
    CLAIMED,
    IPV4_HEADER,
    IPV6_HEADER,
    PLAIN_IPV4,
    TCP,
    TCP_CHECKSUM,
    UDP,
    UDP_CHECKSUM,
    UNKNOWN,
    Layout,
    checksum_place,
    claimed_length,
    dissect,
    outline,
    transport_header,
)
from crossedge.meshd.sink import LARGEST_PACKET
from crossedge.meshd.train import Send
from crossedge.meshd.virtio import (
    GSO_ECN,
    GSO_NONE,
    GSO_PROTOCOLS,
    GSO_UDP_L4,
    HEADER,
    NEEDS_CHECKSUM,
    SIZE,
    UDP_SEGMENTS,
    Header,
    Offloads,
)
from crossedge.wire.endpoint import Endpoint
from crossedge.wire.errors import WireError

FLOWS_KEPT: Final = 1024  # in a table, which is emptied when it is full

# Keys, read from a frame. First byte; fragment field, TTL, protocol; addresses; TCP's header length.
IN4: Final = Struct(f"={SIZE}xB5x4s2x8s").unpack_from
IN4_TCP: Final = Struct(f"={SIZE}xB5x4s2x8s12xB").unpack_from
# First byte; next header, hop limit, addresses; TCP's header length.
IN6: Final = Struct(f"={SIZE}xB5x34s").unpack_from
IN6_TCP: Final = Struct(f"={SIZE}xB5x34s12xB").unpack_from
# Before that: flags and type; segment size, checksum start and offset, now together with the first byte.
OUT4: Final = Struct("=2s2x7s5x4s2x8s").unpack_from
OUT4_TCP: Final = Struct("=2s2x7s5x4s2x8s12xB").unpack_from
OUT6: Final = Struct("=2s2x7s5x34s").unpack_from
OUT6_TCP: Final = Struct("=2s2x7s5x34s12xB").unpack_from

TCP_READ: Final = 13  # bytes of a TCP header that its key reaches into
_CHECKSUMS: Final = {TCP: TCP_CHECKSUM, UDP: UDP_CHECKSUM}
LEAST4: Final = SIZE + IPV4_HEADER + TCP_READ  # a frame's length for any of the keys
LEAST6: Final = SIZE + IPV6_HEADER + TCP_READ


def as_claimed(buffer: bytearray, length: int) -> bool:
    """Tell whether a frame whose key was found is as long as its IP header says, `length` bytes.

    A super-packet over IPv4 that is longer than the header can say states nothing.
    """
    if length > SIZE + CLAIMED:
        return buffer[SIZE] == PLAIN_IPV4 and not buffer[SIZE + 2] and not buffer[SIZE + 3]
    if buffer[SIZE] == PLAIN_IPV4:
        return length == SIZE + (buffer[SIZE + 2] << 8 | buffer[SIZE + 3])
    return length == SIZE + IPV6_HEADER + (buffer[SIZE + 4] << 8 | buffer[SIZE + 5])


@dataclass(slots=True)
class SuperKind:
    """A kind of super-packet that leaves; offsets and sizes in bytes."""

    layout: Layout
    header: int
    """Where the payload begins in the packet."""
    gso_type: int
    gso_size: int
    measures: object = None
    """Those of the link (`Growth.measures`) by which the two below were worked out."""
    stride: int = 0
    """Payload of a piece; 0 where it has to be cut into plain packets."""
    most: int = 0
    """Payload of the longest record; 0 where no record of several datagrams takes any."""

    @classmethod
    def of(cls, frame: memoryview) -> SuperKind:
        """Return the kind of a frame; raises `WireError` where no kernel makes such a super-packet."""
        flags, gso_type, _, gso_size, start, _ = HEADER.unpack_from(frame)
        gso_type &= ~GSO_ECN
        if not flags & NEEDS_CHECKSUM:
            raise WireError("gso-checksum")
        packet = frame[SIZE:]
        layout = outline(packet)
        if claimed_length(packet) != (len(packet) if len(packet) <= CLAIMED or layout.version == 6 else 0):
            raise WireError("inner-length")
        header = transport_header(packet, layout)
        if (
            GSO_PROTOCOLS.get((gso_type, layout.version)) != layout.protocol
            or not header
            or not gso_size
            or start != layout.transport
        ):
            raise WireError("gso-type")
        return cls(layout, header, gso_type, gso_size)


class Lane(NamedTuple):
    """How packets that come alone leave for a link, as long as keypair and endpoints stay what they are."""

    keypair: Keypair
    endpoints: tuple[Endpoint, ...]
    until: float
    """When the keypair is too old, in seconds of `now`."""
    head: bytes
    """The header of their datagrams without the counter."""
    sends: tuple[Send, ...]


@dataclass(slots=True)
class OutFlow:
    """What is known of a frame from the TUN by its key."""

    link: Link
    """To whom it goes."""
    least: int
    """The shortest frame for which the key says all of this, in bytes."""
    joinable: bool
    """It may begin a run of UDP packets."""
    partial: bool
    """The checksum is partial, and where a receiver looks for it."""
    start: int
    """Where the checksum begins to count, and from there its place, as in the virtio header."""
    offset: int
    kind: SuperKind | None
    """Set for a super-packet, which has to be as long as its IP header says."""
    lane: Lane | None = None
    """That of the link when the last such packet came alone."""


def out_flow(frame: memoryview, link: Link, kind: SuperKind | None) -> OutFlow | None:
    """Return what the key of a frame that may leave for a link says; None where it does not say all."""
    flags, _, _, _, start, offset = HEADER.unpack_from(frame)
    transport, protocol = _plain_transport(frame[SIZE:])
    least = SIZE + transport + (TCP_READ if protocol == TCP else 0)
    partial = bool(flags & NEEDS_CHECKSUM)
    if kind is not None:
        if kind.layout.transport != transport:
            return None
        least = SIZE + kind.header
    elif partial and (start, offset) != (transport, _CHECKSUMS.get(protocol)):
        return None
    if not transport or len(frame) < least:
        return None
    return OutFlow(link, least, partial and protocol == UDP, partial, start, offset, kind)


def usual_place(packet: memoryview, start: int, offset: int) -> bool:
    """Tell whether the receiver will find the checksum where the kernel says it is, from the packet alone.

    It is elsewhere where the packet is a tunnel of its own, and the kernel means the header inside of it.
    Raises `WireError` where the packet is none.
    """
    transport, protocol = _plain_transport(packet)
    if (start, offset) == (transport, _CHECKSUMS.get(protocol)):
        return True
    return checksum_place(packet, dissect(packet)) == start + offset


def inbound_key(frame: memoryview) -> tuple[tuple[Any, ...], int] | None:
    """Return the key of an inbound frame and its length by its IP header, in bytes; None: it is too short."""
    size = len(frame)
    if size < LEAST4:
        return None
    if frame[SIZE] == PLAIN_IPV4:
        read = (IN4_TCP if frame[SIZE + 9] == TCP else IN4)(frame)
        return read, SIZE + (frame[SIZE + 2] << 8 | frame[SIZE + 3])
    if size < LEAST6:
        return None
    read = (IN6_TCP if frame[SIZE + 6] == TCP else IN6)(frame)
    return read, SIZE + IPV6_HEADER + (frame[SIZE + 4] << 8 | frame[SIZE + 5])


@dataclass(slots=True)
class InFlow:
    """What is known of a frame from a link by its key; it has to be as long as its IP header says."""

    shortest: int
    """Lengths of frames for which the key says all of this, in bytes."""
    longest: int
    layout: Layout
    virtio: Header
    """The header to write in front of the packet."""
    packed: bytes
    """The same; empty where the device does not take such a packet as it is."""


def in_flow(frame: memoryview, layout: Layout, virtio: Header, offloads: Offloads) -> InFlow:
    """Return what is known of a frame that was found good, to be remembered if `may_recall`."""
    header = transport_header(frame[SIZE:], layout)
    shortest, longest = SIZE + (header or layout.transport), SIZE + LARGEST_PACKET
    takes = offloads.checksum or not virtio.flags
    if virtio.gso_type != GSO_NONE:
        shortest += virtio.gso_size + 1  # else it is no super-packet
        takes = takes and virtio.gso_type in offloads.gso
        if virtio.gso_type == GSO_UDP_L4:
            longest = SIZE + header + UDP_SEGMENTS * virtio.gso_size
            takes = takes and len(frame) <= longest
    packed = virtio.pack(offloads.link_header) if takes else b""
    return InFlow(shortest, longest, layout, virtio, packed)


def may_recall(packet: memoryview, layout: Layout) -> bool:
    """Tell whether the key says all that decides about an inbound packet."""
    return _plain_transport(packet) == (layout.transport, layout.protocol) and not layout.fragment


def _plain_transport(packet: memoryview) -> tuple[int, int]:
    """Return where the transport header begins and its protocol; 0 and UNKNOWN where options come before it.

    Extension headers are not told from transport headers.
    """
    if packet[0] == PLAIN_IPV4:
        return IPV4_HEADER, packet[9]
    return (IPV6_HEADER, packet[6]) if packet[0] >> 4 == 6 else (0, UNKNOWN)
