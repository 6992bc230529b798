"""Telling datagrams apart by their first bytes, in the order of docs/protocol.md, section 1.

01..04 00 00 00                          WireGuard message
00 01 | 01 01 | 01 11, 21 12 A4 42 at 4  STUN
CE 01                                    sealed control message
CE 02                                    relay envelope
CE 03                                    superframe chunk
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

Buffer = bytes | bytearray | memoryview

MAGIC_COOKIE: Final = 0x2112A442
"""RFC 8489, section 5: at offset 4 of each STUN message."""


class Kind(IntEnum):
    """What a datagram is. 1 to 4 are WireGuard's own message types."""

    UNKNOWN = 0
    INITIATION = 1
    RESPONSE = 2
    COOKIE = 3
    TRANSPORT = 4
    STUN = 5
    CONTROL = 6
    RELAY = 7
    CHUNK = 8


SHORTEST: Final = 8
"""No datagram of ours, WireGuard's or STUN's is shorter than this, in bytes."""

_HEAD = Struct(">II").unpack_from
_FOUR_BYTES: Final = {
    0x01000000: Kind.INITIATION,
    0x02000000: Kind.RESPONSE,
    0x03000000: Kind.COOKIE,
    0x04000000: Kind.TRANSPORT,
}
_TWO_BYTES: Final = {
    0x0001: Kind.STUN,
    0x0101: Kind.STUN,
    0x0111: Kind.STUN,
    0xCE01: Kind.CONTROL,
    0xCE02: Kind.RELAY,
    0xCE03: Kind.CHUNK,
}


def classify(buffer: Buffer, offset: int = 0, end: int | None = None) -> Kind:
    """Return what the datagram at `buffer[offset:end]` claims to be, without a copy and without a check."""
    if (len(buffer) if end is None else end) - offset < SHORTEST:
        return Kind.UNKNOWN
    first, second = _HEAD(buffer, offset)
    kind = _FOUR_BYTES.get(first)
    if kind is None:
        kind = _TWO_BYTES.get(first >> 16, Kind.UNKNOWN)
        if kind is Kind.STUN and second != MAGIC_COOKIE:
            return Kind.UNKNOWN
    return kind
