"""Joining consecutive super-packets of one TCP flow to one beyond 64 KiB, where the device takes such.

IPv4 only, as Linux does it since 6.3 ("BIG TCP"): the total length in the IP header is 0 and the device's
packet says how long it is. Joined are super-packets that follow one another in one drain and differ in
nothing but length, identification, sequence number, PSH on the last and checksums: parts of what was one at
the sender, or what came to be alike. Only the first one's headers are changed; the payloads of the others
stay where they are.

A kernel that has no memory for so much at once takes the super-packets as they came.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, Final, TypeAlias

from crossedge.meshd.link import Link
from crossedge.meshd.packet import ACK, CLAIMED, DONT_FRAGMENT, IPV4_HEADER, PSH, TCP_CHECKSUM
from crossedge.meshd.segment import TCP_FLAGS, progression, renew_header_checksum, set_length
from crossedge.meshd.sink import Sink
from crossedge.meshd.superframe import FRAME, FRAME_SIZE, LAST_PIECE, PARTIAL_CHECKSUM
from crossedge.meshd.virtio import GSO_TCPV4, SIZE

Key: TypeAlias = tuple[Link, int, int, bool, tuple[Any, ...]]
"""From which link, type and segment size, whether the checksum is partial, and what the packet says."""
JOINED: Final = 6
"""Super-packets at most: as many records as there are buffers to open them into."""

# In a frame: type of service; TCP's ports, sequence number, acknowledgement, header length, flags, window.
_HEADERS: Final = Struct(f"!{SIZE + 1}xB{IPV4_HEADER - 2}x4sIIBBH").unpack_from
_OFFSET_AT: Final = SIZE + IPV4_HEADER + 12
_OPTIONS_AT: Final = SIZE + IPV4_HEADER + 20
_FLAGS_AT: Final = IPV4_HEADER + TCP_FLAGS  # in a packet
_CHECKSUM: Final = slice(IPV4_HEADER + TCP_CHECKSUM, IPV4_HEADER + TCP_CHECKSUM + 2)


class Joiner:
    """Takes super-packets in order and writes them to the sink, joined where they follow one another."""

    __slots__ = (
        "_head",
        "_next",
        "_packed",
        "_payload",
        "_sink",
        "_size",
        "_step",
        "_value",
        "expected",
        "frames",
        "joined",
        "length",
        "link",
    )

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.frames: list[memoryview] = []
        """Those that wait for what follows: their memory must not change until `flush`."""
        self.joined = 0
        """Super-packets that went into longer ones."""
        self.expected = b""
        """How a record's plaintext begins that has the next part, equally long; empty: none is expected."""
        self.length = 0
        """How long that packet is, in bytes."""
        self.link: Link | None = None
        """From which link it would come."""
        self._value = self._step = self._payload = 0  # of what is expected
        self._next = 0  # sequence number of what follows
        self._size = 0  # of them as one packet, in bytes
        self._head: tuple[object, ...] = ()
        self._packed = b""

    def take(self, frame: memoryview, packed: bytes, gso_size: int, key: Key) -> None:
        """Take a valid TCP super-packet over IPv4 without options, and its virtio header as it is written.

        `key` is what else must be alike.
        """
        service, ports, sequence, acknowledged, offset, flags, window = _HEADERS(frame)
        header = SIZE + IPV4_HEADER + (offset >> 4) * 4
        payload = len(frame) - header
        head = service, ports, acknowledged, offset, window, frame[_OPTIONS_AT:header], key
        frames = self.frames
        if frames:
            if sequence == self._next and flags & ~PSH == ACK and head == self._head:
                frames.append(frame)
                self._size += payload
                self._next = (sequence + payload) & 0xFFFFFFFF
                self.expected = b""
                if len(frames) == JOINED or flags & PSH or payload % gso_size:
                    self.flush()
                return
            self.flush()
        if flags != ACK or payload % gso_size or not frame[SIZE + 6] & (DONT_FRAGMENT >> 8):
            self._sink.put(frame, packed)
            return
        self.frames = [frame]
        self._size = len(frame) - SIZE
        self._next = (sequence + payload) & 0xFFFFFFFF
        self._head = head
        self._packed = packed
        self.link = key[0]
        self._expect(frame, header, payload, gso_size)

    def _expect(self, frame: memoryview, header: int, payload: int, gso_size: int) -> None:
        """Foresee what follows the first frame."""
        head = FRAME.pack(PARTIAL_CHECKSUM | LAST_PIECE, GSO_TCPV4, gso_size, len(frame) - SIZE)
        head += frame[SIZE:header]
        foreseen = progression(head, FRAME_SIZE, payload, gso_size, JOINED)
        if foreseen is None:
            self.expected = b""
            return
        self._value, self._step = foreseen[0] + foreseen[1], foreseen[1]
        self._payload, self.length = payload, len(frame) - SIZE
        self.expected = self._value.to_bytes(len(head), "big")

    def follow(self, frame: memoryview) -> None:
        """Take the frame that was expected: all of its headers are as they should be."""
        frames = self.frames
        frames.append(frame)
        payload = self._payload
        self._size += payload
        self._next = (self._next + payload) & 0xFFFFFFFF
        if len(frames) == JOINED:
            self.flush()
            return
        self._value += self._step
        self.expected = self._value.to_bytes(len(self.expected), "big")

    def flush(self) -> None:
        """Write what waits."""
        frames, self.frames, self.expected = self.frames, [], b""
        if len(frames) == 1:
            self._sink.put(frames[0], self._packed)
        elif frames:
            self._write(frames)

    def _write(self, frames: list[memoryview]) -> None:
        first, size = frames[0], self._size
        header = SIZE + IPV4_HEADER + (first[_OFFSET_AT] >> 4) * 4
        before = bytes(first[:header])
        packet = first[SIZE:]
        # The partial checksum has the length in it, and it is the real one that counts, also beyond 64 KiB.
        partial = int.from_bytes(packet[_CHECKSUM], "big") + size - len(packet)
        packet[_CHECKSUM] = (partial % 65535).to_bytes(2, "big")
        packet[_FLAGS_AT] |= frames[-1][SIZE + _FLAGS_AT] & PSH
        set_length(packet, 4, size if size <= CLAIMED else 0)
        renew_header_checksum(packet, IPV4_HEADER)
        first[:SIZE] = self._packed
        if self._sink.put_joined([first, *(frame[header:] for frame in frames[1:])], size):
            self.joined += len(frames)
            return
        first[:header] = before
        for frame in frames:
            self._sink.put(frame, self._packed)
