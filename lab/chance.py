"""Seeded chance for the laboratory: SplitMix64, the same sequence on every Python and every machine.

Source of the algorithm: G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014.
"""

from __future__ import annotations

from math import cos, log, pi, sqrt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Chance:
    """A stream of reproducible numbers; `fork` starts an independent stream, so that parts do not disturb."""

    __slots__ = ("_state",)

    def __init__(self, seed: int | str) -> None:
        if isinstance(seed, str):
            value = 0xCBF29CE484222325  # FNV-1a, 64 bits
            for byte in seed.encode():
                value = ((value ^ byte) * 0x100000001B3) & _MASK
            seed = value
        self._state = seed & _MASK

    def bits(self) -> int:
        """Return 64 random bits."""
        self._state = (self._state + _GOLDEN) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def below(self, limit: int) -> int:
        """Return an integer of 0 <= n < limit (limit >= 1; the bias is below limit / 2^64)."""
        return (self.bits() * limit) >> 64

    def uniform(self) -> float:
        """Return a number of 0 <= x < 1."""
        return (self.bits() >> 11) * 2.0**-53

    def normal(self) -> float:
        """Return a standard normal number (Box-Muller)."""
        return sqrt(-2.0 * log(1.0 - self.uniform())) * cos(2.0 * pi * self.uniform())

    def token(self, size: int) -> bytes:
        """Return `size` bytes: what a core takes as its `random`."""
        if size <= 8:
            return self.bits().to_bytes(8, "big")[:size]
        value = words = 0
        while words * 8 < size:
            value = value << 64 | self.bits()
            words += 1
        return value.to_bytes(words * 8, "big")[:size]

    def fork(self, name: str) -> Chance:
        """Return an independent stream that depends on this seed and `name` only, not on what was drawn."""
        return Chance(Chance(name).bits() ^ Chance(self._state).bits())
