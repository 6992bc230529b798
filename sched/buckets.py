"""Token buckets by source, in a table of bounded size."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

SOURCES_MAX: Final = 10_000


class Buckets:
    """How much each source may still have. The source that was seen longest ago is forgotten first."""

    def __init__(self, rate: float, burst: float, most: int = SOURCES_MAX) -> None:
        """Give each source `rate` per second and `burst` at once."""
        self._rate, self._burst, self._most = rate, burst, most
        self._held: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, source: str, now: float) -> float:
        """Take one; return 0.0, or the seconds to wait where there is none."""
        level, at = self._held.pop(source, (self._burst, now))
        level = min(self._burst, level + (now - at) * self._rate)
        allowed = level >= 1.0
        self._held[source] = (level - 1.0 if allowed else level, now)
        if len(self._held) > self._most:
            self._held.popitem(last=False)
        return 0.0 if allowed else (1.0 - level) / self._rate
