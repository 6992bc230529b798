"""Super-packets: cutting one into IP packets, and mending the headers of a part of one.

A super-packet is what segmentation offload makes of a stream: one set of headers and a payload of many
segments of `gso_size` bytes. Its checksum field is partial (see `checksum`). Three things are done with it
in software:

- `split` makes the packets that a network card would have made, for peers or devices that take only those;
- `mend` gives a run of consecutive pieces, behind the headers of the whole, headers of its own;
- `fragments` cuts a plain IPv4 packet that is too long and may be cut (RFC 791, 3.2).

What changes from packet to packet is: length, IPv4 identification and header checksum, TCP sequence number,
FIN and PSH (last only), CWR (first only; RFC 3168, 6.1.2), UDP length, transport checksum.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final

from crossedge.meshd.checksum import complement, ones_sum
from crossedge.meshd.packet import (
    CWR,
    FIN,
    FRAGMENT_OFFSET,
    IPV4_HEADER,
    IPV6_HEADER,
    MORE_FRAGMENTS,
    PSH,
    TCP,
    TCP_CHECKSUM,
    UDP_CHECKSUM,
    Buffer,
    Layout,
    claimed_length,
)

_WORD = Struct("!H")
_SEQUENCE = Struct("!I")

TOTAL_LENGTH, IDENTIFICATION, FRAGMENT_FIELD, HEADER_CHECKSUM = 2, 4, 6, 10  # in the IPv4 header
PAYLOAD_LENGTH: Final = 4  # in the IPv6 header
TCP_SEQUENCE, TCP_FLAGS, UDP_LENGTH = 4, 13, 4  # in their headers
# From the IPv4 header's total length to the TCP checksum: length, identification; fragment field, TTL,
# protocol; checksum; addresses, ports; sequence number; acknowledgement; offset; flags; window;
# checksum.
_HEADS = Struct("!HH4sH12sI4sBB2sH")
AT_LAST: Final = FIN | PSH


def mend(packet: memoryview, layout: Layout, before: int, gso_size: int, last: bool) -> None:
    """Make a run of a super-packet's payload, behind the headers of the whole, a super-packet of its own.

    `before` is how many bytes of payload came before the run, `last` whether it reaches the payload's end.
    The checksum stays partial, and a wrong one stays wrong: only the length in it changes.
    """
    transport = layout.transport
    claimed = claimed_length(packet)
    set_length(packet, layout.version, len(packet))
    if layout.version == 4:
        identification = (_WORD.unpack_from(packet, IDENTIFICATION)[0] + before // gso_size) & 0xFFFF
        _WORD.pack_into(packet, IDENTIFICATION, identification)
        renew_header_checksum(packet, transport)
    if layout.protocol == TCP:
        place = transport + TCP_CHECKSUM
        sequence = _SEQUENCE.unpack_from(packet, transport + TCP_SEQUENCE)[0]
        _SEQUENCE.pack_into(packet, transport + TCP_SEQUENCE, (sequence + before) & 0xFFFFFFFF)
        if not last:
            packet[transport + TCP_FLAGS] &= ~AT_LAST & 0xFF
        if before:
            packet[transport + TCP_FLAGS] &= ~CWR & 0xFF
    else:
        place = transport + UDP_CHECKSUM
        _WORD.pack_into(packet, transport + UDP_LENGTH, len(packet) - transport)
    partial = _WORD.unpack_from(packet, place)[0]
    _WORD.pack_into(packet, place, (partial + len(packet) - claimed) % 65535)


class Heads:
    """Writes the headers of the parts of one super-packet, as `mend` does, for those of which there are most.

    That is TCP over IPv4 without options: all that changes from part to part is written at once.
    """

    __slots__ = ("_constant", "_fields", "_gso_size", "_header", "_partial", "_template")

    def __init__(self, template: bytes, gso_size: int, claimed: int) -> None:
        """Take the headers of the whole and the length, in bytes, that its partial checksum has in it."""
        self._template = template
        self._header = len(template)
        self._gso_size = gso_size
        self._fields = fields = _HEADS.unpack_from(template, TOTAL_LENGTH)
        length, identification, _, checksum = fields[:4]
        # All words of the IPv4 header but the two that change; by RFC 1071 their sum is that of all words.
        self._constant = 0xFFFF - checksum + 2 * 0xFFFF - length - identification
        self._partial = fields[-1] - claimed

    def write(self, view: memoryview, at: int, end: int, before: int, *, last: bool) -> None:
        """Make `view[at:end]`, whose payload comes `before` bytes into the whole's, a super-packet.

        `last`: it reaches the payload's end.
        """
        _, identification, fragment, _, addresses, sequence, acknowledged, offset, flags, window, _ = (
            self._fields
        )
        size = end - at
        identification = (identification + before // self._gso_size) & 0xFFFF
        total = self._constant + size + identification
        if not last:
            flags &= ~AT_LAST & 0xFF
        if before:
            flags &= ~CWR & 0xFF
        view[at : at + self._header] = self._template
        _HEADS.pack_into(
            view,
            at + TOTAL_LENGTH,
            size,
            identification,
            fragment,
            -total % 65535,
            addresses,
            (sequence + before) & 0xFFFFFFFF,
            acknowledged,
            offset,
            flags,
            window,
            (self._partial + size) % 65535,
        )


def progression(head: Buffer, at: int, payload: int, gso_size: int, count: int) -> tuple[int, int] | None:
    """Foresee the headers of equal parts of a super-packet: TCP over IPv4 without options.

    `head` ends with the headers of one part, its IPv4 header begins at `at`; each part has `payload` bytes,
    whole segments. Returns `head` as a big-endian number, and what to add for the next part; None where
    something would wrap before `count` parts, or they are not alike.
    """
    _, identification, _, checksum, _, sequence, _, _, flags, _, _ = _HEADS.unpack_from(
        head, at + TOTAL_LENGTH
    )
    segments = payload // gso_size
    if (
        identification + count * segments > 0xFFFF
        or not count * segments < checksum < 0xFFFF
        or sequence + count * payload > 0xFFFFFFFF
        or flags & (AT_LAST | CWR)
    ):
        return None
    behind = 8 * (len(head) - at)  # bits from the IPv4 header on
    step = payload << behind - 8 * 28  # to the sequence number's end
    step += segments << behind - 8 * (IDENTIFICATION + 2)
    step -= segments << behind - 8 * (HEADER_CHECKSUM + 2)
    return int.from_bytes(head, "big"), step


def split(
    packet: memoryview, layout: Layout, header: int, stride: int, out: memoryview, *, full: bool
) -> Iterator[int]:
    """Cut a super-packet into packets with `stride` bytes of payload each (the last may have less).

    Each packet is written to the start of `out`, and its length yielded, before the next one is made.
    `header` is where the payload begins. With `full` the packets have whole checksums, else partial ones.
    """
    transport = layout.transport
    tcp = layout.protocol == TCP
    place = transport + (TCP_CHECKSUM if tcp else UDP_CHECKSUM)
    partial: int = _WORD.unpack_from(packet, place)[0]
    constant = partial - (claimed_length(packet) - transport)  # the pseudo header without the length
    out[:header] = packet[:header]
    identification: int = _WORD.unpack_from(packet, IDENTIFICATION)[0]
    sequence: int = _SEQUENCE.unpack_from(packet, transport + TCP_SEQUENCE)[0]
    flags = packet[transport + TCP_FLAGS] if tcp else 0
    if full:
        _WORD.pack_into(out, place, 0)
        if tcp:
            _SEQUENCE.pack_into(out, transport + TCP_SEQUENCE, 0)
            out[transport + TCP_FLAGS] = 0
        else:
            _WORD.pack_into(out, transport + UDP_LENGTH, 0)
        constant += ones_sum(out[transport:header])
    head_sum = 0
    if layout.version == 4:
        for field in (TOTAL_LENGTH, IDENTIFICATION, HEADER_CHECKSUM):
            _WORD.pack_into(out, field, 0)
        head_sum = ones_sum(out[:transport])
    size = len(packet)
    for start in range(header, size, stride):
        end = min(start + stride, size)
        length = header + end - start
        out[header:length] = packet[start:end]
        set_length(out, layout.version, length)
        if layout.version == 4:
            number = (identification + (start - header) // stride) & 0xFFFF
            _WORD.pack_into(out, IDENTIFICATION, number)
            _WORD.pack_into(out, HEADER_CHECKSUM, complement(head_sum + length + number))
        total = constant + length - transport
        if tcp:
            own = flags if end == size else flags & ~AT_LAST
            if start > header:
                own &= ~CWR
            at = (sequence + start - header) & 0xFFFFFFFF
            _SEQUENCE.pack_into(out, transport + TCP_SEQUENCE, at)
            out[transport + TCP_FLAGS] = own
            total += (at >> 16) + (at & 0xFFFF) + own if full else 0
        else:
            _WORD.pack_into(out, transport + UDP_LENGTH, length - transport)
            total += length - transport if full else 0
        if full:
            checksum = complement(total + ones_sum(packet[start:end]))
            _WORD.pack_into(out, place, checksum if tcp or checksum else 0xFFFF)
        else:
            _WORD.pack_into(out, place, total % 65535)
        yield length


def fragments(packet: memoryview, limit: int) -> list[bytes]:
    """Return an IPv4 packet, which may be fragmented, as fragments of at most `limit` bytes.

    Returns nothing where it has options, which would have to be copied one by one.
    """
    if packet[0] != 0x45:
        return []
    pieces = []
    field: int = _WORD.unpack_from(packet, FRAGMENT_FIELD)[0]
    step = (limit - IPV4_HEADER) // 8 * 8
    for start in range(IPV4_HEADER, len(packet), step):
        end = min(start + step, len(packet))
        piece = bytearray(packet[:IPV4_HEADER])
        piece += packet[start:end]
        offset = (field & FRAGMENT_OFFSET) + (start - IPV4_HEADER) // 8
        more = MORE_FRAGMENTS if end < len(packet) else field & MORE_FRAGMENTS
        _WORD.pack_into(piece, FRAGMENT_FIELD, more | offset)
        view = memoryview(piece)
        set_length(view, 4, len(piece))
        renew_header_checksum(view, IPV4_HEADER)
        pieces.append(bytes(piece))
    return pieces


def set_length(packet: memoryview, version: int, length: int) -> None:
    """Write the length in bytes of the whole packet into its IP header."""
    if version == 4:
        _WORD.pack_into(packet, TOTAL_LENGTH, length)
    else:
        _WORD.pack_into(packet, PAYLOAD_LENGTH, length - IPV6_HEADER)


def renew_header_checksum(packet: memoryview, header: int) -> None:
    """Work out the checksum of an IPv4 header that is `header` bytes long."""
    _WORD.pack_into(packet, HEADER_CHECKSUM, 0)
    _WORD.pack_into(packet, HEADER_CHECKSUM, complement(ones_sum(packet[:header])))
