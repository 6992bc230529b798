"""How large a datagram may be on one path: padded probes up a ladder, and a fall back to what always passes.

Sizes are UDP payloads in bytes, less a relay's header, so they are what a chunk or a transport message may
have. The search starts at the top, because most paths take 1,500 bytes, and halves the rest.
"""

from __future__ import annotations

from typing import Final

from crossedge.wire.relay import HEADER as RELAY_HEADER

IPV4_UDP: Final = 28  # bytes of IPv4 and UDP header
IPV6_UDP: Final = 48
BASE: Final = 1280 - IPV6_UDP  # passes every path that IPv6 may take (RFC 8200, section 5), IPv4 or IPv6
LADDER: Final = (1280, 1360, 1400, 1420, 1440, 1460, 1480, 1492, 1500)  # bytes of MTU
TRIES: Final = 3  # probes of one size before it counts as too large
AGAIN: Final = 600.0  # seconds after which a search that did not reach the top is repeated (RFC 8899, 5.1.1)
CHECK_EVERY: Final = 4  # heartbeats, of which one is as large as data may be


class SizeSearch:
    """The search on one path. Its owner says what passed and what was missed."""

    __slots__ = (
        "_again",
        "_checks_missed",
        "_failed",
        "_high",
        "_low",
        "_pending",
        "_running",
        "base",
        "rungs",
        "size",
    )

    def __init__(self, *, v6: bool, relay: bool) -> None:
        """Take the family of the path's underlay and whether a relay header comes on top."""
        overhead = (IPV6_UDP if v6 else IPV4_UDP) + (RELAY_HEADER if relay else 0)
        self.base = BASE - (RELAY_HEADER if relay else 0)
        self.rungs = tuple(mtu - overhead for mtu in LADDER if mtu - overhead > self.base)
        self.size = self.base
        self._running = False
        self._again: float | None = None
        self._low = -1  # index of the largest rung that passed, -1: only the base
        self._high = len(self.rungs)  # index of the smallest rung that failed
        self._failed = 0
        self._pending = False
        self._checks_missed = 0

    def start(self, now: float) -> None:
        """Search upwards from what is known to pass."""
        self._low = max((index for index, rung in enumerate(self.rungs) if rung <= self.size), default=-1)
        self._high = len(self.rungs)
        self._failed = 0
        self._pending = False
        self._running = self._low + 1 < self._high
        self._again = None if self._running else now + AGAIN

    def restart(self, now: float) -> None:
        """Fall back to the base size at once and search again: the path may be another one now."""
        self.size = self.base
        self._checks_missed = 0
        self.start(now)

    def refused(self, size: int, now: float) -> None:
        """Take the host's own word that a datagram of `size` bytes cannot even leave it (0: it did not say).

        What is as large is not tried again before the search is repeated; what is in use falls back.
        """
        size = size or (self._rung() if self._pending else self.size)
        if size <= self.base:
            return
        if size <= self.size:
            self.size = self.base
            self._low = -1
        self._high = min(self._high, sum(rung < size for rung in self.rungs))
        self._low = min(self._low, self._high - 1)
        self._running = True
        self._step(now)

    def deadline(self) -> float | None:
        """Return when `next` has a size to test, None where it does not by itself."""
        if self._running:
            return None if self._pending else 0.0
        return self._again

    def next(self, now: float) -> int | None:
        """Return a size to test now, or None. One is tested at a time."""
        if not self._running:
            if self._again is None or now < self._again or not self.rungs:
                return None
            self.start(now)
            if not self._running:
                return None
        if self._pending:
            return None
        self._pending = True
        return self._rung()

    def check(self, beat: int) -> int | None:
        """Return the size that heartbeat number `beat` should have to notice a shrunken path, None: small."""
        if self.size <= self.base or (beat % CHECK_EVERY and not self._checks_missed):
            return None
        return self.size

    def passed(self, size: int, now: float) -> None:
        """Take the news that a probe of `size` arrived."""
        if size == self.size:
            self._checks_missed = 0
        if size <= self.size or size not in self.rungs:
            return
        self.size = size
        self._low = self.rungs.index(size)
        self._high = max(self._high, self._low + 1)
        self._step(now)

    def missed(self, size: int, now: float) -> None:
        """Take the news that a probe of `size`, one of `next` or `check`, was not answered in time."""
        if size <= self.size:
            self._checks_missed += 1
            if self._checks_missed >= TRIES:
                self.restart(now)
            return
        self._pending = False
        if not self._running or size != self._rung():
            return
        self._failed += 1
        if self._failed >= TRIES:
            self._high = self.rungs.index(size)
            self._step(now)

    def _rung(self) -> int:
        """The size under test: first the top, then the middle of what is left."""
        if self._high == len(self.rungs):
            return self.rungs[-1]
        return self.rungs[(self._low + self._high) // 2]

    def _step(self, now: float) -> None:
        self._failed = 0
        self._pending = False
        if self._low + 1 >= self._high:
            self._running = False
            self._again = now + AGAIN
