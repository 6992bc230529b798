"""Joining equal UDP packets of one flow, read one after the other, to a super-packet before they are sealed.

Programs that do not segment by offload hand their kernel datagram by datagram, and so the TUN hands them to
us. What is done for each of them costs; what is done for a super-packet is shared by up to 64: the lookup,
the seal, and at the other end the write. Only packets are joined whose headers are alike in all but
identification and IPv4 checksum, whose own checksum is partial (so it is the same, too, and nothing has to be
verified), and that must not be fragmented, which frees the identification of meaning (RFC 6864). Cutting the
super-packet gives the same packets again.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, Final

from crossedge.meshd.packet import (
    DONT_FRAGMENT,
    IPV4_HEADER,
    IPV6_HEADER,
    UDP,
    UDP_CHECKSUM,
    UDP_HEADER,
)
from crossedge.meshd.segment import UDP_LENGTH, renew_header_checksum, set_length
from crossedge.meshd.superframe import PADDING_MOST
from crossedge.meshd.virtio import GSO_NONE, GSO_UDP_L4, HEADER, NEEDS_CHECKSUM, SIZE, UDP_SEGMENTS

LONGEST_RUN: Final = 61_440  # bytes of payload: as one train, headers and all
_WORD = Struct("!H")
_NO_FRAGMENT: Final = _WORD.pack(DONT_FRAGMENT)
_SAME4 = Struct("14s2x4s2x16s")  # virtio header and packet headers but identification and header checksum
_SAME6 = Struct("58s")
_PARTIAL4: Final = HEADER.pack(NEEDS_CHECKSUM, GSO_NONE, 0, 0, IPV4_HEADER, UDP_CHECKSUM)
_PARTIAL6: Final = HEADER.pack(NEEDS_CHECKSUM, GSO_NONE, 0, 0, IPV6_HEADER, UDP_CHECKSUM)


class UdpRun:
    """One run: frames that were read and do belong together so far."""

    __slots__ = ("_header", "_length", "_same", "_unpack", "_used", "buffer", "count", "view")

    def __init__(self) -> None:
        self.buffer = bytearray(SIZE + IPV6_HEADER + UDP_HEADER + LONGEST_RUN + PADDING_MOST)
        """The super-packet's frame: virtio header, packet headers, payload. Its user may overwrite it."""
        self.view = memoryview(self.buffer)
        self.count = 0
        """Packets in it."""
        self._length = 0
        self._used = 0
        self._header = 0
        self._unpack = _SAME4.unpack_from
        self._same: tuple[Any, ...] = ()

    def begin(self, frame: memoryview) -> bool:
        """Take the first frame, virtio header and packet; False where nothing may be joined to it."""
        if frame[SIZE] == 0x45:
            if (
                frame[:SIZE] != _PARTIAL4
                or frame[SIZE + 9] != UDP
                or frame[SIZE + 6 : SIZE + 8] != _NO_FRAGMENT
            ):
                return False
            header, self._unpack = SIZE + IPV4_HEADER + UDP_HEADER, _SAME4.unpack_from
        else:
            if frame[:SIZE] != _PARTIAL6 or frame[SIZE] >> 4 != 6 or frame[SIZE + 6] != UDP:
                return False
            header, self._unpack = SIZE + IPV6_HEADER + UDP_HEADER, _SAME6.unpack_from
        length = len(frame)
        if not header < length <= header + LONGEST_RUN // 2:
            return False
        self._header, self._length = header, length
        self.view[:length] = frame
        self._same = self._unpack(self.buffer)
        self._used = length
        self.count = 1
        return True

    def append(self, buffer: bytearray, length: int, frame: memoryview) -> bool:
        """Take the frame in the first `length` bytes of a buffer if it continues the run."""
        if length != self._length or self.count == UDP_SEGMENTS or self._unpack(buffer) != self._same:
            return False
        after = self._used + length - self._header
        if after > self._header + LONGEST_RUN:
            return False
        self.view[self._used : after] = frame[self._header : length]
        self._used = after
        self.count += 1
        return True

    def finish(self) -> int:
        """Close the run, its headers made to fit; returns the length of the frame in the buffer."""
        if self.count > 1:
            packet = self.view[SIZE : self._used]
            transport = self._header - SIZE - UDP_HEADER
            before, size = self._length - SIZE, len(packet)
            set_length(packet, 4 if transport == IPV4_HEADER else 6, size)
            if transport == IPV4_HEADER:
                renew_header_checksum(packet, transport)
            _WORD.pack_into(packet, transport + UDP_LENGTH, size - transport)
            place = transport + UDP_CHECKSUM
            partial = _WORD.unpack_from(packet, place)[0]
            _WORD.pack_into(packet, place, (partial + size - before) % 65535)
            payload = self._length - self._header
            HEADER.pack_into(
                self.buffer,
                0,
                NEEDS_CHECKSUM,
                GSO_UDP_L4,
                self._header - SIZE,
                payload,
                transport,
                UDP_CHECKSUM,
            )
        self.count = 0
        return self._used
