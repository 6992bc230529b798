"""Sequence numbers that grow for ever, whatever the clock does and however often the daemon starts.

A number is the Unix time in microseconds, or one more than the last number, whichever is greater. The shell
persists a bound above every number that was given out, in steps of an hour, so that it writes once an hour.
"""

from __future__ import annotations

from collections.abc import Callable

RESERVE_AHEAD = 3_600_000_000  # microseconds: how far above the number in use the persisted bound is put
SEQUENCE_MAX = 2**64 - 1
TAI_EPOCH = 2**62 + 10  # TAI64 label of the Unix epoch (1970-01-01 00:00:10 TAI)


class Sequence:
    """A source of strictly growing u64 numbers."""

    __slots__ = ("_reserve", "_reserved", "_unix", "floor", "last")

    def __init__(self, floor: int, unix: Callable[[float], float], reserve: Callable[[int], None]) -> None:
        """Continue above `floor`, the bound that an earlier life persisted (0: none).

        `unix` turns CLOCK_BOOTTIME into Unix seconds. `reserve(bound)` must make `bound` durable before it
        returns: no number above the last durable bound is ever given out.
        """
        self.last = floor
        self.floor = 0
        """The highest number that `raise_to` was told: what was made with this or a lower one is void."""
        self._reserved = floor
        self._unix = unix
        self._reserve = reserve

    def next(self, now: float) -> int:
        """Return the next number; OverflowError when 64 bits are used up."""
        value = max(int(self._unix(now) * 1_000_000), self.last + 1)
        if value > SEQUENCE_MAX:
            raise OverflowError("sequence numbers are used up")
        if value > self._reserved:
            bound = min(value + RESERVE_AHEAD, SEQUENCE_MAX)
            self._reserve(bound)
            self._reserved = bound
        self.last = value
        return value

    def due(self, now: float) -> int | None:
        """Return a bound that should be made durable at leisure (then call `reserved`), or None.

        Whoever does that in the background spares `next` from waiting for the disk.
        """
        value = max(int(self._unix(now) * 1_000_000), self.last)
        if value + RESERVE_AHEAD // 2 <= self._reserved or value >= SEQUENCE_MAX:
            return None
        return min(value + RESERVE_AHEAD, SEQUENCE_MAX)

    def reserved(self, bound: int) -> None:
        """Take note that a bound is durable."""
        self._reserved = max(self._reserved, bound)

    def raise_to(self, floor: int) -> None:
        """Give out only numbers above `floor` from now on; it must come from something that we signed."""
        self.floor = max(self.floor, min(floor, SEQUENCE_MAX - 1))
        self.last = max(self.last, self.floor)


def tai64n(microseconds: int) -> bytes:
    """Return the 12-byte TAI64N label of a sequence number, as a WireGuard initiation carries it."""
    seconds, rest = divmod(microseconds, 1_000_000)
    return (TAI_EPOCH + seconds).to_bytes(8, "big") + (rest * 1000).to_bytes(4, "big")
