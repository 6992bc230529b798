"""Cookies: proof that a sender receives at the address it writes from.

A cookie is a keyed hash of address, port and the sender's control key. Nothing is kept per sender: a secret
that turns over every two minutes is all the state there is, and the secret before it is still accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2s

from crossedge.wire.endpoint import UdpEndpoint, pack_endpoint

COOKIE_SECRET_TIME = 120.0
"""Seconds until the secret turns over (WireGuard paper, 5.4.7); a cookie holds for one to two of these."""

COOKIE_SIZE = 16


class CookieJar:
    """Makes and recognises cookies."""

    def __init__(self, random: Callable[[int], bytes], now: float) -> None:
        self._random = random
        self._current = random(32)
        self._previous = random(32)
        self._turned = now

    def give(self, source: UdpEndpoint, sender: bytes, now: float) -> bytes:
        """Return the cookie for a sender's control key at an address."""
        self._turn(now)
        return _cookie(self._current, source, sender)

    def accepted(self, source: UdpEndpoint, sender: bytes, now: float) -> Iterator[bytes]:
        """Yield the cookies that count for a sender at an address: the current and the one before."""
        self._turn(now)
        yield _cookie(self._current, source, sender)
        yield _cookie(self._previous, source, sender)

    def _turn(self, now: float) -> None:
        age = now - self._turned
        if age < COOKIE_SECRET_TIME:
            return
        # After a longer pause nobody holds a cookie of the last period; a fresh secret stands in its place.
        self._previous = self._current if age < 2 * COOKIE_SECRET_TIME else self._random(32)
        self._current = self._random(32)
        self._turned = now


def _cookie(secret: bytes, source: UdpEndpoint, sender: bytes) -> bytes:
    return blake2s(pack_endpoint(source) + sender, key=secret, digest_size=COOKIE_SIZE).digest()
