"""The blocklist from peer to peer, inside sessions: no rendezvous can withhold it or roll it back.

A record says which serial its owner holds. Who holds less asks that peer for the list, one part after the
other; what comes is untrusted until the whole is verified by the directory.
"""

from __future__ import annotations

from typing import Final

from crossedge.meshd.inner import BlocklistAsk, BlocklistPart
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.limits import MAX_BLOCKLIST
from crossedge.wire.messages import MAX_PART

TRIES: Final = 5  # questions for one part
TRY_TIME: Final = 0.5  # seconds until a part is asked for again


def part_of(blocklist: Blocklist, ask: BlocklistAsk) -> BlocklistPart | None:
    """Return the part that was asked for; None where there is no such list here, or no such part."""
    encoded = blocklist.encode()
    if ask.serial not in (0, blocklist.serial) or ask.offset % MAX_PART or ask.offset >= len(encoded):
        return None
    data = encoded[ask.offset : ask.offset + MAX_PART]
    return BlocklistPart(blocklist.serial, len(encoded), ask.offset, data)


class PeerFetch:
    """One blocklist on its way from one peer. Core."""

    __slots__ = ("_held", "_parts", "_serial", "_size", "_total", "_tries", "due", "node_id")

    def __init__(self, node_id: bytes, held: int, now: float) -> None:
        """Ask `node_id` for a list with a serial above `held`; the first question is due at once."""
        self.node_id = node_id
        self.due = now
        """When the next question is due, in seconds of `now`."""
        self._held = held
        self._serial = 0
        self._total = 0
        self._parts: list[bytes] = []
        self._size = 0
        self._tries = 0

    def ask(self, now: float) -> BlocklistAsk | None:
        """Return the question to send now; None where the peer was asked often enough."""
        if self._tries >= TRIES:
            return None
        self._tries += 1
        self.due = now + TRY_TIME
        return BlocklistAsk(self._serial, self._size)

    def take(self, part: BlocklistPart, now: float) -> bytes | None:
        """Take a part of the list; return the whole once it is complete."""
        if not self._size and self._held < part.serial and 0 < part.total <= MAX_BLOCKLIST:
            self._serial, self._total = part.serial, part.total
        rest = self._total - self._size
        if (part.serial, part.total, part.offset) != (self._serial, self._total, self._size):
            return None
        if len(part.data) != min(MAX_PART, rest):
            return None
        self._parts.append(part.data)
        self._size += len(part.data)
        self._tries = 0
        self.due = now
        return b"".join(self._parts) if self._size == self._total else None
