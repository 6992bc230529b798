"""Cutting a TCP super-packet into packets with whole checksums, and sealing them as transport data.

It does what `segment.split` does for a peer that takes no superframes, in as few steps for each packet as
there can be: packets are written by one call each to where they are sealed, in the train; what is the same in
all of them is summed up once, and datagrams' headers are written by one call for all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain, repeat
from struct import Struct

from crossedge.meshd.checksum import ones_sum, quarter_sums
from crossedge.meshd.constants import PADDING, TAG_SIZE, TRANSPORT_HEADER, TRANSPORT_OVERHEAD, MessageType
from crossedge.meshd.keypair import HEADER, NONCE, Keypair
from crossedge.meshd.link import Link
from crossedge.meshd.packet import CWR, TCP_CHECKSUM, Layout, claimed_length
from crossedge.meshd.segment import AT_LAST, IDENTIFICATION, TCP_SEQUENCE, set_length
from crossedge.meshd.stockrun import Places
from crossedge.meshd.train import Train

_IPV4 = Struct("!HHHH")  # from the identification on: that, fragment, TTL and protocol, header checksum
_TCP = Struct("!IIHHH")  # from the sequence number on: that, acknowledgement, flags, window, checksum


def room(link: Link) -> int:
    """Return how long a packet, in bytes, fits into one datagram."""
    return link.datagram_size - TRANSPORT_OVERHEAD


def padded(size: int, link: Link) -> int:
    """Return how long a packet of `size` bytes is with padding (paper, 5.4.6), as far as there is room."""
    return max(size, min(size + -size % PADDING, room(link)))


class _Packets:
    """The packets of one super-packet, made one after the other; what changes between them is kept here."""

    def __init__(self, packet: memoryview, layout: Layout, header: int, stride: int) -> None:
        self.packet = packet
        self.layout = layout
        self.stride = stride
        self.start = header
        """Where in the super-packet the next payload begins."""
        self.length = header + stride
        """Bytes of the next packet."""
        transport = layout.transport
        self.head = head = bytearray(packet[:header])
        set_length(memoryview(head), layout.version, self.length)
        # In IPv6 the first and the last of these words stand for what is there, and do not change.
        self.number, self.fragment, self.ttl, self.head_sum = _IPV4.unpack_from(head, IDENTIFICATION)
        if layout.version == 4:
            self.head_sum = ones_sum(head[:transport]) - self.number - self.head_sum
        at, acknowledged, flags, window, partial = _TCP.unpack_from(head, transport + TCP_SEQUENCE)
        self.at, self.flags, self.fixed = at, flags & ~AT_LAST, (acknowledged, window)
        self.at_last = flags & AT_LAST
        # The pseudo header without the length, and those fields of TCP's that do not change.
        self.constant = partial - (claimed_length(packet) - transport) + acknowledged + window
        self.constant += ones_sum(head[transport : transport + TCP_SEQUENCE])
        self.constant += ones_sum(head[transport + TCP_CHECKSUM + 2 :]) + self.length - transport

    def write_alike(self, buffer: bytearray, place: int, distance: int, count: int) -> None:
        """Write `count` packets, none of them the last, to `place` and at this distance."""
        head, transport, constant, stride = self.head, self.layout.transport, self.constant, self.stride
        at, own, (acked, window) = self.at, self.flags, self.fixed
        front, middle = bytes(head[:4]), bytes(head[6:10])
        names, rest = bytes(head[12 : transport + TCP_SEQUENCE]), bytes(head[transport + TCP_CHECKSUM + 2 :])
        write = _packet(transport, len(head), stride).pack_into
        quarters = _pieces(stride, count).unpack_from(self.packet, self.start)
        numbers: Iterable[int] = repeat(self.number)
        sums: Iterable[int] = repeat(self.head_sum)
        if self.layout.version == 4:
            numbers = [each & 0xFFFF for each in range(self.number, self.number + count)]
            sums = [-(self.head_sum + number) % 65535 for number in numbers]
            self.number = (self.number + count) & 0xFFFF
        parts = iter(quarters)
        packets = zip(numbers, sums, quarter_sums(quarters), parts, parts, parts, parts, strict=False)
        for number, ip, total, a, b, c, d in packets:
            tcp = -(constant + at + own + total) % 65535
            write(
                buffer, place, front, number, middle, ip, names, at, acked, own, window, tcp, rest, a, b, c, d
            )
            at = (at + stride) & 0xFFFFFFFF
            own &= ~CWR
            place += distance
        self.at, self.flags = at, own
        self.start += count * stride

    def write_last(self, buffer: bytearray, place: int, link: Link) -> int:
        """Write the last packet to `place` and return how long it is with its padding, in bytes."""
        payload, transport = self.packet[self.start :], self.layout.transport
        shorter = self.stride - len(payload)
        length = self.length - shorter
        size = padded(length, link)
        set_length(memoryview(self.head), self.layout.version, length)
        buffer[place : place + size] = b"".join((self.head, payload, bytes(size - length)))
        if self.layout.version == 4:
            head_sum = -(self.head_sum - shorter + self.number) % 65535
            at = place + IDENTIFICATION
            _IPV4.pack_into(buffer, at, self.number, self.fragment, self.ttl, head_sum)
        own, (acknowledged, window) = self.flags | self.at_last, self.fixed
        checksum = -(self.constant - shorter + self.at + own + ones_sum(payload)) % 65535
        at = place + transport + TCP_SEQUENCE
        _TCP.pack_into(buffer, at, self.at, acknowledged, own, window, checksum)
        return size


class StreamSealer:
    """Seals super-packets of TCP, in trains of their own."""

    __slots__ = ("_places", "_train")

    def __init__(self, train: Train) -> None:
        self._train = train
        self._places = Places()

    def seal(
        self, link: Link, keypair: Keypair, packet: memoryview, layout: Layout, header: int, stride: int
    ) -> None:
        """Cut a super-packet, whose checksum is partial, into packets with `stride` bytes of payload each.

        They are encrypted where they are written.
        """
        train, packets = self._train, _Packets(packet, layout, header, stride)
        output, buffer, encrypt_into = train.view, train.buffer, keypair.send.encrypt_into
        datagram = padded(packets.length, link) + TRANSPORT_OVERHEAD
        word = MessageType.TRANSPORT | keypair.remote_index << 32
        left = -(-(len(packet) - header) // stride)
        while left:
            train.send()
            count = min(left, train.capacity(link, datagram))
            left -= count
            counter = keypair.reserve(count)
            alike = count if left else count - 1
            counters = range(counter, counter + alike)
            if alike:
                headers = chain.from_iterable(zip(repeat(word), counters, strict=False))
                _train(datagram, alike).pack_into(buffer, 0, *headers)
                packets.write_alike(buffer, TRANSPORT_HEADER, datagram, alike)
                views = self._places.views(output, 0, datagram, datagram, alike)
                nonces = map(NONCE.pack, counters)
                deque(map(encrypt_into, nonces, views.plain, repeat(None), views.sealed), 0)
            used = alike * datagram
            if not left:
                counter, body = counter + alike, used + TRANSPORT_HEADER
                HEADER.pack_into(buffer, used, MessageType.TRANSPORT, keypair.remote_index, counter)
                after = body + packets.write_last(buffer, body, link)
                used = after + TAG_SIZE
                encrypt_into(NONCE.pack(counter), output[body:after], None, output[body:used])
            train.load(link, datagram, count, used)


@lru_cache(maxsize=64)
def _packet(transport: int, header: int, stride: int) -> Struct:
    """Return the structure of a packet, with its payload in four parts.

    Before that: four bytes, identification, four bytes, checksum, what is up to the ports; sequence number,
    acknowledgement, flags, window, checksum, the rest.
    """
    names, behind = transport + TCP_SEQUENCE - 12, header - transport - TCP_CHECKSUM - 2
    return Struct(f"!4sH4sH{names}sIIHHH{behind}s{_quarters(stride)}")


def _quarters(stride: int) -> str:
    """Return the format of a payload in four parts, of which only the last may be of odd length."""
    quarter = stride // 8 * 2
    return f"{quarter}s{quarter}s{quarter}s{stride - 3 * quarter}s"


@lru_cache(maxsize=512)
def _pieces(stride: int, count: int) -> Struct:
    """Return the structure of `count` payloads."""
    return Struct(_quarters(stride) * count)


@lru_cache(maxsize=512)
def _train(datagram: int, count: int) -> Struct:
    """Return the structure of `count` datagrams: type and receiver, counter; what follows is emptied."""
    return Struct("<" + f"QQ{datagram - TRANSPORT_HEADER}x" * count)
