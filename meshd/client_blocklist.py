"""Putting a blocklist together from its parts."""

from __future__ import annotations

from typing import Final

from crossedge.meshd.client_requests import Make
from crossedge.wire.limits import MAX_BLOCKLIST
from crossedge.wire.messages import MAX_PART, BlocklistPart, GetBlocklist

WINDOW: Final = 8  # parts that may be asked for at a time


class BlocklistFetch:
    """One blocklist on its way. Core; what comes is untrusted until the whole is verified."""

    def __init__(self, held: int) -> None:
        """Only a serial above `held` is of interest."""
        self._held = held
        self._serial = 0
        self._total: int | None = None
        self._parts: dict[int, bytes] = {}
        self._asked: set[int] = set()

    def next_offset(self) -> int | None:
        """Return the offset of a part to ask for now, each once; None where enough are outstanding."""
        if len(self._asked) - len(self._parts) >= WINDOW:
            return None
        for offset in range(0, 1 if self._total is None else self._total, MAX_PART):
            if offset not in self._asked:
                self._asked.add(offset)
                return offset
        return None

    def question(self, offset: int) -> Make:
        """Return what makes the question for a part."""
        serial = self._serial
        return lambda id_, _: GetBlocklist(id=id_, serial=serial, offset=offset)

    def take(self, part: BlocklistPart) -> bool:
        """Take a part; return False where nothing can come of it (not newer, too large, another list)."""
        if self._total is None:
            if part.serial <= self._held or not 0 < part.total <= MAX_BLOCKLIST:
                return False
            self._serial, self._total = part.serial, part.total
        if (part.serial, part.total) != (self._serial, self._total) or part.offset not in self._asked:
            return False
        if len(part.data) != min(MAX_PART, part.total - part.offset):
            return False
        self._parts[part.offset] = part.data
        return True

    def whole(self) -> bytes | None:
        """Return the encoded blocklist once every part is there."""
        if self._total is None or len(self._parts) * MAX_PART < self._total:
            return None
        return b"".join(data for _, data in sorted(self._parts.items()))
