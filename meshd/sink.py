"""What is written to the TUN: each frame in a form that this device takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from crossedge.meshd.checksum import complete
from crossedge.meshd.packet import UDP, Layout
from crossedge.meshd.segment import split
from crossedge.meshd.virtio import (
    GSO_NONE,
    GSO_UDP_L4,
    NEEDS_CHECKSUM,
    PLAIN,
    SIZE,
    UDP_SEGMENTS,
    Header,
    Offloads,
)

LARGEST_PACKET: Final = 65_575  # an IPv6 packet without jumbo payload

Write = Callable[[memoryview], None]
"""Take one frame (virtio header and packet) for the TUN. The memory is the caller's again afterwards."""

Join = Callable[[list[memoryview]], bool]
"""The same for a frame in parts; False where the kernel has no memory for all of it at once."""


class Sink:
    """The TUN's mouth. Does in software what the device cannot."""

    __slots__ = ("_join", "_scratch", "_view", "_write", "offloads", "packets", "size")

    def __init__(self, write: Write, offloads: Offloads) -> None:
        self.offloads = offloads
        self._write = write
        self._join: Join = lambda _: False
        self._scratch = bytearray(SIZE + LARGEST_PACKET)
        self._view = memoryview(self._scratch)
        self.packets = 0
        """Frames written."""
        self.size = 0
        """Bytes of packets written."""

    def write_to(self, write: Write, join: Join, offloads: Offloads) -> None:
        """Give frames to another device from now on."""
        self._write, self._join, self.offloads = write, join, offloads

    def write(self, frame: memoryview, header: Header, layout: Layout) -> None:
        """Write a packet that begins at `frame[SIZE]`; its virtio header is put in front of it."""
        if header.gso_type != GSO_NONE and not self._takes(header, len(frame)):
            self._split(frame[SIZE:], header, layout)
            return
        self._put(frame, header, layout)

    def put(self, frame: memoryview, packed: bytes) -> None:
        """Write a packet that begins at `frame[SIZE]` behind a virtio header as this device takes it."""
        frame[:SIZE] = packed
        self.packets += 1
        self.size += len(frame) - SIZE
        self._write(frame)

    def put_joined(self, parts: list[memoryview], size: int) -> bool:
        """Write a packet of `size` bytes in parts, the first behind a virtio header; False: not done."""
        if not self._join(parts):
            return False
        self.packets += 1
        self.size += size
        return True

    def _takes(self, header: Header, size: int) -> bool:
        if header.gso_type not in self.offloads.gso:
            return False
        payload = size - SIZE - header.header_length
        return header.gso_type != GSO_UDP_L4 or payload <= UDP_SEGMENTS * header.gso_size

    def _split(self, packet: memoryview, header: Header, layout: Layout) -> None:
        out = self._view[SIZE:]
        plain = Header(NEEDS_CHECKSUM, GSO_NONE, 0, 0, header.checksum_start, header.checksum_offset)
        for length in split(packet, layout, header.header_length, header.gso_size, out, full=False):
            self._put(self._view[: SIZE + length], plain, layout)

    def _put(self, frame: memoryview, header: Header, layout: Layout) -> None:
        if header.flags and not self.offloads.checksum:
            start = header.checksum_start
            complete(frame[SIZE:], start, start + header.checksum_offset, udp=layout.protocol == UDP)
            frame[:SIZE] = PLAIN
        else:
            frame[:SIZE] = header.pack(self.offloads.link_header)
        self.packets += 1
        self.size += len(frame) - SIZE
        self._write(frame)
