"""What time it is, for a host whose clock may be wrong.

Edge hosts boot in 1970, or a year ahead, and learn the time later or never. So there are two questions with
two answers. `issuing` is the best guess, for what we sign. `certain` is a time that has surely passed, for
what we refuse as expired: a wrong clock must not cut a node off. Both are Unix seconds and never below the
floor (our own certificate, the last time that was known); a rendezvous's word counts only while the clock
is not synchronised, and is never persisted.
"""

from __future__ import annotations

MAX_HINTS = 8  # rendezvous whose word on the time is kept


class Wallclock:
    """Unix time as a function of CLOCK_BOOTTIME, with a floor."""

    __slots__ = ("_floor", "_hints", "_offset", "synchronised")

    def __init__(self, floor: float, now: float) -> None:
        """Start from `floor`, Unix seconds that had passed at `now`; the clock counts only once `set`."""
        self._floor = floor - now
        self._offset = self._floor
        self._hints: dict[object, float] = {}
        self.synchronised = False

    def set(self, offset: float, synchronised: bool) -> None:
        """Take the system clock: Unix time is `now + offset`; the kernel says whether it is synchronised."""
        self._offset = offset
        self.synchronised = synchronised

    def hint(self, source: object, unix: float, now: float) -> None:
        """Take the word of `source`, a rendezvous, that it is `unix` now."""
        self._hints.pop(source, None)
        if len(self._hints) >= MAX_HINTS:
            del self._hints[next(iter(self._hints))]
        self._hints[source] = unix - now

    def issuing(self, now: float) -> float:
        """Return the best guess of the time, for what is signed now."""
        if self.synchronised or not self._hints:
            return now + max(self._floor, self._offset)
        return now + max(self._floor, *self._hints.values())

    def certain(self, now: float) -> float:
        """Return a time that has surely passed: what ended before it is refused."""
        if self.synchronised:
            return now + max(self._floor, self._offset)
        if not self._hints:
            return now + self._floor
        return now + max(self._floor, min(self._offset, max(self._hints.values())))

    def known(self, now: float) -> float:
        """Return the time to persist as the floor of the next start: no rendezvous has a say in it."""
        return now + (max(self._floor, self._offset) if self.synchronised else self._floor)
