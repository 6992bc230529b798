"""The relay envelope: what a rendezvous forwards unread between the two sides of a channel.

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +---------------+---------------+-------------------------------+
    |     0xCE      |     0x02      |                               |
    +---------------+---------------+      channel (48 bits,        |
    |                                      big-endian)              |
    +---------------------------------------------------------------+
    |                        opaque payload  ...                    |
    +---------------------------------------------------------------+

Each segment of a train carries the header.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from crossedge.wire.demux import Buffer
from crossedge.wire.errors import WireError

HEADER: Final = 8
"""Bytes before the payload."""

CHANNELS: Final = 1 << 48
"""How many channel ids there are."""

_MAGIC: Final = 0xCE02
_WORD = Struct(">Q")


def pack_header(channel: int) -> bytes:
    """Return the 8 bytes that go before a payload; `ValueError` if the channel is not 48 bits."""
    if not 0 <= channel < CHANNELS:
        raise ValueError(f"not a channel: {channel!r}")
    return _WORD.pack(_MAGIC << 48 | channel)


def unpack_header(buffer: Buffer, offset: int = 0) -> int:
    """Return the channel of the untrusted envelope at `offset`; raises only `WireError`."""
    if len(buffer) - offset < HEADER:
        raise WireError("truncated", "relay header")
    word: int = _WORD.unpack_from(buffer, offset)[0]
    if word >> 48 != _MAGIC:
        raise WireError("not-relay")
    return word & (CHANNELS - 1)
