"""Token buckets that cost the same whoever floods: a table of fixed size, and single buckets.

A source is limited by its prefix (/24, /56: what one subscriber usually holds), a node by its id. A hostile
sender can neither make the table grow nor win a fresh allowance by pushing others out of it: who takes over
a slot inherits what is left in it.
"""

from __future__ import annotations

import socket
from array import array
from collections.abc import Callable

WAYS = 4
"""Slots that one key may live in."""

_WORD = (1 << 64) - 1
NO_KEY = _WORD
"""What stands in a slot that nobody has had."""
_V6 = 1 << 56


def prefix_key(host: str) -> int:
    """Return the number of a host's /24 (IPv4) or /56 (IPv6), the unit in which sources are limited."""
    if ":" in host:
        return _V6 | int.from_bytes(socket.inet_pton(socket.AF_INET6, host)[:7])
    first, second, third, _ = host.split(".")
    return int(first) << 16 | int(second) << 8 | int(third)


class Bucket:
    """One token bucket; a rate of 0 means without limit."""

    __slots__ = ("_burst", "_rate", "_stamp", "_tokens")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._stamp = now

    def has(self, now: float, cost: float = 1.0) -> bool:
        """Tell whether `take` would succeed."""
        if not self._rate:
            return True
        if now > self._stamp:
            self._tokens = min(self._burst, self._tokens + (now - self._stamp) * self._rate)
            self._stamp = now
        return self._tokens >= cost

    def take(self, now: float, cost: float = 1.0) -> bool:
        """Take `cost` tokens and return True, or leave the bucket as it is and return False."""
        if not self.has(now, cost):
            return False
        self._tokens -= cost
        return True


class BucketTable:
    """Token buckets for any number of 64-bit keys in `slots` slots.

    Keys are spread by multiply-shift hashing with a secret multiplier, so that nobody outside can choose
    whom to share a set with. In a full set the newcomer takes the slot with most tokens, as they are.
    """

    def __init__(self, slots: int, rate: float, burst: float, random: Callable[[int], bytes]) -> None:
        bits = max(1, (slots // WAYS - 1).bit_length())
        self._shift = 64 - bits
        self._multiplier = int.from_bytes(random(8)) | 1
        size = WAYS << bits
        self._keys = array("Q", [NO_KEY]) * size
        self._tokens = array("d", [burst]) * size
        self._stamps = array("d", [0.0]) * size
        self._rate = rate
        self._burst = burst

    def __len__(self) -> int:
        return len(self._keys)

    def take(self, key: int, now: float, cost: float = 1.0) -> bool:
        """Take `cost` tokens of the key's bucket and return True, or change nothing and return False."""
        return self.take_some(key, now, cost, cost) > 0

    def take_some(self, key: int, now: float, least: float, most: float) -> float:
        """Take as many tokens as there are between `least` and `most`; return how many, 0 if too few."""
        keys, tokens, stamps = self._keys, self._tokens, self._stamps
        base = ((key * self._multiplier & _WORD) >> self._shift) * WAYS
        for slot in range(base, base + WAYS):
            if keys[slot] == key:
                break
        else:
            slot = max(range(base, base + WAYS), key=lambda place: self._level(place, now))
            keys[slot] = key
        level = self._level(slot, now)
        stamps[slot] = max(now, stamps[slot])
        taken = min(most, level)
        if taken < least:
            tokens[slot] = level
            return 0.0
        tokens[slot] = level - taken
        return taken

    def refund(self, key: int, amount: float) -> None:
        """Give back what was taken and not used."""
        base = ((key * self._multiplier & _WORD) >> self._shift) * WAYS
        for slot in range(base, base + WAYS):
            if self._keys[slot] == key:
                self._tokens[slot] = min(self._burst, self._tokens[slot] + amount)

    def _level(self, slot: int, now: float) -> float:
        elapsed = max(0.0, now - self._stamps[slot])
        return min(self._burst, self._tokens[slot] + elapsed * self._rate)
