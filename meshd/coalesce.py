"""Joining consecutive packets of one flow to a super-packet before they are written, as a kernel's GRO does.

Only what can be cut back into exactly the same packets is joined: TCP segments that follow one another with
nothing but ACK (and PSH on the last) set, datagrams of one UDP flow; of equal size but for a shorter last
one; with equal headers otherwise (TTL, TOS, options, acknowledgement, window, flow label ...). IPv4
identifications must count up unless "don't fragment" makes them meaningless (RFC 6864).

A super-packet's checksum is left to the kernel, which makes it right. So a packet is joined only if its own
is partial (the sender's kernel left it to us) or was found right here: a wrong checksum stays wrong and
alone.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from typing import Final, NamedTuple

from crossedge.meshd.checksum import pseudo_sum, transport_is_right
from crossedge.meshd.packet import (
    ACK,
    DONT_FRAGMENT,
    ECE,
    IPV4_HEADER,
    IPV6_HEADER,
    PSH,
    TCP,
    TCP_CHECKSUM,
    TCP_HEADER,
    UDP,
    UDP_CHECKSUM,
    UDP_HEADER,
    Layout,
    addresses,
    claimed_length,
)
from crossedge.meshd.segment import (
    HEADER_CHECKSUM,
    IDENTIFICATION,
    PAYLOAD_LENGTH,
    TCP_FLAGS,
    TCP_SEQUENCE,
    TOTAL_LENGTH,
    UDP_LENGTH,
    renew_header_checksum,
    set_length,
)
from crossedge.meshd.sink import Sink
from crossedge.meshd.virtio import (
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    NEEDS_CHECKSUM,
    SIZE,
    SMALLEST_SEGMENT,
    UDP_SEGMENTS,
    Header,
)

FLOWS: Final = 16  # super-packets that grow at a time; each has a buffer
LONGEST: Final = 65_535  # bytes of a super-packet

_WORD = Struct("!H")
_TCP4 = Struct("!4xH18xI4xBB")  # identification, sequence number, header length, flags
_TCP6 = Struct("!44xI4xBB")
_UDP4 = Struct("!4xH18xHH")  # identification, length, checksum
_UDP6 = Struct("!44xHH")
_PLAIN_HEADERS: Final = {4: IPV4_HEADER, 6: IPV6_HEADER}
_GSO_TYPES: Final = {(4, TCP): GSO_TCPV4, (6, TCP): GSO_TCPV6, (4, UDP): GSO_UDP_L4, (6, UDP): GSO_UDP_L4}


class _Segment(NamedTuple):
    """What was read from one packet that may be joined."""

    header: int
    """Where the payload begins."""
    payload: int
    """Its length in bytes."""
    sequence: int
    """TCP's; 0 for UDP."""
    identification: int
    """IPv4's; -1 where it means nothing."""
    push: bool
    """PSH is set: nothing is joined behind it."""


class Awaited(NamedTuple):
    """What the next TCP packets of a super-packet look like, for one who opens them straight into it."""

    view: memoryview
    """The super-packet's buffer."""
    end: int
    """Where in it the next payload belongs."""
    header: int
    """Length of a packet's headers in bytes."""
    payload: int
    """Length of its payload; that of a whole packet is the sum."""
    transport: int
    """Where its TCP header begins."""
    room: int
    """How many such packets fit."""
    mask: int
    """The bits of the headers, as one number, that can be told beforehand."""
    head: int
    """Those of the next packet."""
    step: int
    """What is added to them from packet to packet."""


class _Growing:
    """A super-packet, from its first packet on."""

    __slots__ = ("alone", "count", "end", "first", "layout", "next", "push", "signature", "verified", "view")

    def __init__(self) -> None:
        self.view = memoryview(bytearray(SIZE + LONGEST))

    def begin(self, frame: memoryview, layout: Layout, virtio: Header, first: _Segment) -> None:
        """Take the first packet and the virtio header with which it goes where nothing follows."""
        self.end = len(frame)
        self.view[: self.end] = frame
        self.layout = layout
        self.alone = virtio
        self.first = first
        self.next = first
        self.count = 1
        self.push = False
        self.verified = bool(virtio.flags)
        self.signature = _signature(frame[SIZE:], layout, first.header)

    def follows(self, packet: memoryview, segment: _Segment) -> bool:
        """Tell whether a packet of this flow continues what is here."""
        return self.continues(segment) and (_signature(packet, self.layout, segment.header) == self.signature)

    def continues(self, segment: _Segment) -> bool:
        """Tell whether a packet whose headers are alike continues what is here."""
        first, last = self.first, self.next
        if (
            segment.payload > first.payload
            or segment.header != first.header
            or self.end + segment.payload > SIZE + LONGEST
        ):
            return False
        if segment.identification >= 0 and segment.identification != (last.identification + 1) & 0xFFFF:
            return False
        if self.layout.protocol == TCP:
            if segment.sequence != (last.sequence + last.payload) & 0xFFFFFFFF:
                return False
        elif self.count >= UDP_SEGMENTS:
            return False
        return True

    def append(self, packet: memoryview, segment: _Segment) -> None:
        """Take the payload of a packet that follows."""
        after = self.end + segment.payload
        self.view[self.end : after] = packet[segment.header :]
        self.end = after
        self.next = segment
        self.count += 1
        self.push = segment.push

    def vouch(self) -> bool:
        """Tell whether the first packet's own checksum is right, if that was not known."""
        if not self.verified:
            self.verified = _is_right(self.view[SIZE : self.end], self.layout)
        return self.verified

    def awaited(self) -> Awaited | None:
        """Return what can be told of the packets that come next; None where that is not worth the while."""
        first, last, layout = self.first, self.next, self.layout
        if layout.protocol != TCP:
            return None
        header, payload = first.header, first.payload
        sequence, identification = (last.sequence + last.payload) & 0xFFFFFFFF, last.identification + 1
        count = min(
            (SIZE + LONGEST - self.end) // payload,
            (0xFFFFFFFF - sequence) // payload,  # numbers must not wrap, so that headers can be added to
            0xFFFF - identification,
        )
        if count <= 0:
            return None
        mask, sequence_unit, identification_unit = _predictable(layout.version, header, identification > 0)
        head = int.from_bytes(self.view[SIZE : SIZE + header], "big") & mask
        head += (sequence - first.sequence) * sequence_unit
        head += (identification - first.identification) * identification_unit
        step = payload * sequence_unit + identification_unit
        return Awaited(self.view, self.end, header, payload, layout.transport, count, mask, head, step)

    def grow(self, count: int, total: int) -> bool:
        """Take `count` awaited packets whose payloads are put in place: see `Coalescer.grow`."""
        first, last, packet = self.first, self.next, self.view[SIZE:]
        length = first.header + first.payload - self.layout.transport
        total += count * pseudo_sum(addresses(packet), TCP, length)
        if total % 65535 or not self.vouch():
            return False
        self.end += count * first.payload
        self.count += count
        self.next = first._replace(
            sequence=(last.sequence + count * first.payload) & 0xFFFFFFFF,
            identification=last.identification + count if last.identification >= 0 else -1,
        )
        return True

    def finish(self) -> tuple[memoryview, Header]:
        """Return the frame, its headers made to fit all of the payload, and its virtio header."""
        frame = self.view[: self.end]
        if self.count == 1:
            return frame, self.alone
        packet = frame[SIZE:]
        transport, protocol = self.layout.transport, self.layout.protocol
        set_length(packet, self.layout.version, len(packet))
        if self.layout.version == 4:
            renew_header_checksum(packet, transport)
        length = len(packet) - transport
        if protocol == TCP:
            offset = TCP_CHECKSUM
            packet[transport + TCP_FLAGS] |= PSH if self.push else 0
        else:
            offset = UDP_CHECKSUM
            _WORD.pack_into(packet, transport + UDP_LENGTH, length)
        partial = pseudo_sum(addresses(packet), protocol, length)
        _WORD.pack_into(packet, transport + offset, partial)
        first = self.first
        gso_type = _GSO_TYPES[self.layout.version, protocol]
        return frame, Header(NEEDS_CHECKSUM, gso_type, first.header, first.payload, transport, offset)


class Coalescer:
    """Takes packets in order and writes them to the sink, alone or joined; `flush` lets the rest go."""

    __slots__ = ("_last", "_sink", "_spare", "growing", "joined")

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.growing: dict[tuple[int, bytes], _Growing] = {}
        """What was begun and not written yet, by protocol, addresses and ports."""
        self._spare: list[_Growing] = []
        self._last: tuple[object, _Growing, tuple[int, bytes]] | None = None
        self.joined = 0
        """Packets that went into super-packets."""

    def extend(self, owner: object, packet: memoryview) -> bool:
        """Take a packet with a whole checksum, not looked at yet, if it plainly continues the last one.

        It came from the same `owner` then, its headers are those of a packet that was found valid, addresses
        and all, but for what changes along a flow, and its length and checksum are right. Else nothing is
        done.
        """
        if self._last is None or self._last[0] is not owner:
            return False
        _, growing, key = self._last
        layout, size = growing.layout, len(packet)
        if (
            size <= growing.first.header
            or _signature(packet, layout, growing.first.header) != growing.signature
        ):
            return False
        segment = _read(packet, layout, partial=False)
        if (
            segment is None
            or claimed_length(packet) != size
            or not growing.continues(segment)
            or not growing.vouch()
            or not _is_right(packet, layout)
        ):
            return False
        growing.append(packet, segment)
        if segment.push or segment.payload < growing.first.payload:
            self._finish(key)
        return True

    def awaited(self, owner: object) -> Awaited | None:
        """Return what continues the last packet that was taken, if it came from `owner` and is TCP."""
        return self._last[1].awaited() if self._last is not None and self._last[0] is owner else None

    def grow(self, count: int, total: int) -> bool:
        """Take `count` packets that `awaited` described: headers as told; payloads follow, where they belong.

        `total` is the sum of their 16-bit words, from the TCP headers on. One sum stands for all
        their checksums: one that is wrong is always noticed, several are unless their errors cancel out (by
        chance one time in 65,535, which is how much one checksum sees of one packet). More is not needed: the
        packets were authenticated, so the sums only guard against what went wrong inside of the peer. Linux's
        WireGuard does not look at them at all. False, and nothing is done, where the sum is wrong.
        """
        return self._last is not None and self._last[1].grow(count, total)

    def add(self, frame: memoryview, layout: Layout, virtio: Header, owner: object = None) -> None:
        """Take one valid packet at `frame[SIZE:]` and the virtio header with which it would go alone.

        `owner` is whom it came from, for `extend`.
        """
        packet = frame[SIZE:]
        gso_type = _GSO_TYPES.get((layout.version, layout.protocol))
        if layout.fragment or gso_type is None or layout.transport != _PLAIN_HEADERS[layout.version]:
            self._sink.write(frame, virtio, layout)
            return
        key = (layout.protocol, bytes(packet[12:24] if layout.version == 4 else packet[8:44]))
        growing = self.growing.get(key)
        segment = _read(packet, layout, partial=bool(virtio.flags))
        if growing is not None:
            if (
                segment is not None
                and growing.follows(packet, segment)
                and growing.vouch()
                and (virtio.flags or _is_right(packet, layout))
            ):
                growing.append(packet, segment)
                self._last = owner, growing, key
                if segment.push or segment.payload < growing.first.payload:
                    self._finish(key)
                return
            self._finish(key)
        if (
            segment is None
            or segment.push
            or segment.payload < SMALLEST_SEGMENT
            or gso_type not in self._sink.offloads.gso
        ):
            self._sink.write(frame, virtio, layout)
            return
        if len(self.growing) >= FLOWS:
            self._finish(next(iter(self.growing)))
        growing = self.growing[key] = self._spare.pop() if self._spare else _Growing()
        growing.begin(frame, layout, virtio, segment)
        self._last = owner, growing, key

    def flush(self) -> None:
        """Write everything that still grows, in the order in which it began."""
        while self.growing:
            self._finish(next(iter(self.growing)))

    def _finish(self, key: tuple[int, bytes]) -> None:
        growing = self.growing.pop(key)
        self._last = None
        frame, virtio = growing.finish()
        if growing.count > 1:
            self.joined += growing.count
        self._sink.write(frame, virtio, growing.layout)
        self._spare.append(growing)


def _read(packet: memoryview, layout: Layout, partial: bool) -> _Segment | None:
    """Return what must be known of a packet with plain headers, or None where it must go alone."""
    size = len(packet)
    meaningless = layout.version == 6 or bool(packet[6] & (DONT_FRAGMENT >> 8))
    if layout.protocol == TCP:
        if size < layout.transport + TCP_HEADER:
            return None
        identification, sequence, offset, flags = (
            _TCP4.unpack_from(packet) if layout.version == 4 else (0, *_TCP6.unpack_from(packet))
        )
        header = layout.transport + (offset >> 4) * 4
        if header < layout.transport + TCP_HEADER or header >= size or flags & ~(PSH | ECE) != ACK:
            return None
        push = bool(flags & PSH)
    else:
        header = layout.transport + UDP_HEADER
        if header >= size:
            return None
        identification, length, checksum = (
            _UDP4.unpack_from(packet) if layout.version == 4 else (0, *_UDP6.unpack_from(packet))
        )
        if length != size - layout.transport or not (partial or checksum):
            return None
        sequence, push = 0, False
    return _Segment(header, size - header, sequence, -1 if meaningless else identification, push)


def _is_right(packet: memoryview, layout: Layout) -> bool:
    return transport_is_right(packet[layout.transport :], addresses(packet), layout.protocol)


def _signature(packet: memoryview, layout: Layout, header: int) -> int:
    """Return those bits of the headers that all packets of a super-packet share."""
    return int.from_bytes(packet[:header], "big") & _mask(layout.version, layout.protocol, header)


@lru_cache(maxsize=64)
def _mask(version: int, protocol: int, header: int) -> int:
    mask = bytearray(b"\xff" * header)
    if version == 4:
        for field in (TOTAL_LENGTH, IDENTIFICATION, HEADER_CHECKSUM):
            mask[field : field + 2] = bytes(2)
    else:
        mask[PAYLOAD_LENGTH : PAYLOAD_LENGTH + 2] = bytes(2)
    transport = _PLAIN_HEADERS[version]
    if protocol == TCP:
        mask[transport + TCP_SEQUENCE : transport + TCP_SEQUENCE + 4] = bytes(4)
        mask[transport + TCP_FLAGS] = ~PSH & 0xFF
        checksum = transport + TCP_CHECKSUM
    else:
        mask[transport + UDP_LENGTH : transport + UDP_LENGTH + 2] = bytes(2)
        checksum = transport + UDP_CHECKSUM
    mask[checksum : checksum + 2] = bytes(2)
    return int.from_bytes(mask, "big")


@lru_cache(maxsize=64)
def _predictable(version: int, header: int, numbered: bool) -> tuple[int, int, int]:
    """Return which bits of a TCP packet's headers follow from the packet before, if both are equally long.

    And what one is worth in the sequence number and in the identification (0 where it is not `numbered`).
    """

    def field(start: int, size: int) -> tuple[int, int]:
        unit = 1 << 8 * (header - start - size)
        return ((1 << 8 * size) - 1) * unit, unit

    transport = _PLAIN_HEADERS[version]
    sequence, sequence_unit = field(transport + TCP_SEQUENCE, 4)
    flags, _ = field(transport + TCP_FLAGS, 1)
    length, _ = field(TOTAL_LENGTH if version == 4 else PAYLOAD_LENGTH, 2)
    mask = _mask(version, TCP, header) | sequence | flags | length
    if not numbered:
        return mask, sequence_unit, 0
    identification, identification_unit = field(IDENTIFICATION, 2)
    return mask | identification, sequence_unit, identification_unit
