"""Datagrams for the relay that were read one by one, put side by side again as the train that they were.

Where the network card does not join what belongs together, each datagram costs a call to read it. Those that
follow one another from one source for one channel leave by one call all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.relay import HEADER

TRAIN_DATAGRAMS: Final = 64
TRAIN_BYTES: Final = 65_000
MAGIC: Final = b"\xce\x02"


@dataclass(frozen=True, slots=True)
class Gathered:
    """Datagrams from one source, `segment` bytes each, the last maybe less; they begin the buffer."""

    size: int
    segment: int
    source: UdpEndpoint
    local: int


class Gathering:
    """What was gathered so far, at the beginning of `view`; the next datagram is to be read behind it."""

    __slots__ = ("_count", "_head", "_local", "_segment", "_source", "used", "view")

    def __init__(self, view: memoryview) -> None:
        """Take a buffer with room for `TRAIN_BYTES` and one datagram more."""
        self.view = view
        self.used = 0
        self._count = 0
        self._segment = 0
        self._head = b""
        self._source: UdpEndpoint | None = None
        self._local = 0

    def add(self, size: int, source: UdpEndpoint, local: int) -> bool:
        """Take the datagram of `size` bytes behind `used`; False where it does not belong to the others."""
        start = self.used
        head = bytes(self.view[start : start + HEADER])
        if head[:2] != MAGIC or size <= HEADER:
            return False
        if not self._count:
            self._segment, self._head, self._source, self._local = size, head, source, local
        elif (
            size > self._segment
            or head != self._head
            or start != self._count * self._segment
            or self._count == TRAIN_DATAGRAMS
            or start + size > TRAIN_BYTES
            or source != self._source
            or local != self._local
        ):
            return False
        self.used = start + size
        self._count += 1
        return True

    def take(self) -> Gathered | None:
        """Return what was gathered, None where that is nothing, and begin anew."""
        used, self.used, self._count = self.used, 0, 0
        if not used or self._source is None:
            return None
        return Gathered(used, self._segment, self._source, self._local)
