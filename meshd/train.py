"""Trains: equal datagrams to one peer, built side by side in one buffer, sent by one system call.

UDP_SEGMENT cuts a train into datagrams of one size; only the last may be shorter. The bounds below are what
goes out as one train everywhere: the kernel refuses more than 128 segments, and sends a train of nearly 64
KiB as single datagrams, without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from crossedge.meshd.constants import PADDING, TRANSPORT_OVERHEAD
from crossedge.meshd.link import Link
from crossedge.wire.endpoint import Endpoint

TRAIN_SEGMENTS: Final = 64
TRAIN_BYTES: Final = 65_400
LONGEST_UDP: Final = 65_507  # bytes of UDP payload in IPv4; wireguard-go makes its trains that long
LEAST_MTU: Final = 1280  # bytes, of IPv6 (RFC 8200, 5)

Parts = list[memoryview]
"""The bytes of a train, one part behind the other. Of a list with several the parts stay where they are."""

Transmit = Callable[[Endpoint, Parts, int], None]
"""Send parts as datagrams of so many bytes (the last may be shorter); the memory is reused afterwards."""

Send = Callable[[memoryview], None]
"""Send one datagram where it always goes; the memory is reused afterwards."""


def whole_mtu(mtu: int) -> int:
    """Return the largest inner MTU up to `mtu`, in bytes, at which a stock peer's trains stay whole.

    wireguard-go fills a train up to what UDP takes, which is more than what a device takes: 46 datagrams of
    1,424 bytes, which an inner MTU of 1,380 makes, are cut by its kernel one by one, and cost both sides
    several times as much. With four bytes less in each packet they are not.
    """
    while mtu > LEAST_MTU:
        datagram = mtu + -mtu % PADDING + TRANSPORT_OVERHEAD
        if min(TRAIN_SEGMENTS, LONGEST_UDP // datagram) * datagram <= TRAIN_BYTES:
            break
        mtu = max(LEAST_MTU, (mtu - 1) // PADDING * PADDING)
    return mtu


class Train:
    """The one send buffer. A datagram that does not fit what is in it lets that go first."""

    __slots__ = ("_closed", "_count", "_link", "_segment", "_used", "buffer", "transmit", "view")

    def __init__(self, transmit: Transmit) -> None:
        self.buffer = bytearray(65_536)
        self.view = memoryview(self.buffer)
        self.transmit = transmit
        """For what need not wait here."""
        self._link: Link | None = None
        self._used = 0
        self._count = 0
        self._segment = 0
        self._closed = False

    def place(self, link: Link, size: int) -> int:
        """Return where in the buffer the next datagram of `size` bytes has to be written."""
        if self._count and (
            link is not self._link
            or self._closed
            or size > self._segment
            or self._count == TRAIN_SEGMENTS
            or self._used + size + (self._count + 1) * link.overhead > TRAIN_BYTES
        ):
            self.send()
        if not self._count:
            self._link = link
            self._segment = size
        elif size < self._segment:
            self._closed = True
        offset = self._used
        self._used = offset + size
        self._count += 1
        return offset

    @staticmethod
    def capacity(link: Link, size: int) -> int:
        """Return how many datagrams of `size` bytes a train of bulk takes."""
        return max(1, min(link.growth.train, TRAIN_SEGMENTS, TRAIN_BYTES // (size + link.overhead)))

    def load(self, link: Link, segment: int, count: int, used: int) -> None:
        """Take what the caller wrote to the buffer itself, from its start, after `send`."""
        self._link = link
        self._segment = segment
        self._count = count
        self._used = used
        self._closed = True

    def send(self) -> None:
        """Send what is in the buffer, the same bytes to each endpoint of the link, and empty it."""
        link = self._link
        if not self._count or link is None:
            return
        parts = [self.view[: self._used]]
        for endpoint in link.endpoints:
            self.transmit(endpoint, parts, self._segment)
        link.sent.datagrams += self._count
        self._link = None
        self._used = self._count = 0
        self._closed = False

    def send_parts(self, link: Link, parts: Parts, segment: int, count: int) -> None:
        """Send a train that lies elsewhere, behind what is in the buffer."""
        if self._count:
            self.send()
        for endpoint in link.endpoints:
            self.transmit(endpoint, parts, segment)
        link.sent.datagrams += count
