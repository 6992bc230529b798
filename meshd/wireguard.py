"""The handshake messages of WireGuard and the MACs that guard them (paper, 5.4.2 to 5.4.7).

Numbers are little-endian; an index is a number that its owner chose at random.

Initiation, 148 bytes:

    0        1                 4                  8                   40                   88
    +--------+-----------------+------------------+-------------------+--------------------+------
    | type 1 | 0 0 0           | sender index     | ephemeral key     | static key, sealed |
    +--------+-----------------+------------------+-------------------+--------------------+------
    88                        116                 132                 148
    +-------------------------+-------------------+-------------------+
    | timestamp, sealed       | mac1              | mac2              |
    +-------------------------+-------------------+-------------------+

Response, 92 bytes:

    0        1                 4                  8                   12                   44
    +--------+-----------------+------------------+-------------------+--------------------+------
    | type 2 | 0 0 0           | sender index     | receiver index    | ephemeral key      |
    +--------+-----------------+------------------+-------------------+--------------------+------
    44                        60                  76                  92
    +-------------------------+-------------------+-------------------+
    | nothing, sealed         | mac1              | mac2              |
    +-------------------------+-------------------+-------------------+

Cookie reply, 64 bytes:

    0        1                 4                  8                   32                   64
    +--------+-----------------+------------------+-------------------+--------------------+
    | type 3 | 0 0 0           | receiver index   | nonce             | cookie, sealed     |
    +--------+-----------------+------------------+-------------------+--------------------+

mac1 is keyed by the recipient's public key: who sends it knows whom it talks to. mac2 is keyed by a cookie
that the recipient gave to this very address: who sends it can receive there.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Callable
from hashlib import blake2s
from typing import Final

from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
)
from nacl.exceptions import CryptoError

from crossedge.meshd.constants import (
    COOKIE_SECRET_LATENCY,
    COOKIE_SECRET_TIME,
    COOKIE_SIZE,
    INITIATION_SIZE,
    LABEL_COOKIE,
    LABEL_MAC1,
    MAC_SIZE,
    RESPONSE_SIZE,
    MessageType,
)

INITIATION_NOISE: Final = slice(8, 116)
RESPONSE_NOISE: Final = slice(12, 60)
SIZES: Final = {
    MessageType.INITIATION: INITIATION_SIZE,
    MessageType.RESPONSE: RESPONSE_SIZE,
    MessageType.COOKIE: COOKIE_SIZE,
}
NONCE_SIZE: Final = 24
NO_MAC: Final = bytes(MAC_SIZE)

_ONE_INDEX = struct.Struct("<II")
_TWO_INDICES = struct.Struct("<III")


def handshake_type(datagram: bytes) -> MessageType | None:
    """Return which handshake message these untrusted bytes have the form of, or None."""
    if len(datagram) < 4 or datagram[1:4] != b"\0\0\0":
        return None
    for kind, size in SIZES.items():
        if datagram[0] == kind:
            return kind if len(datagram) == size else None
    return None


def pack_initiation(sender: int, noise: bytes) -> bytes:
    """Return an initiation without its MACs."""
    return _ONE_INDEX.pack(MessageType.INITIATION, sender) + noise


def pack_response(sender: int, receiver: int, noise: bytes) -> bytes:
    """Return a response without its MACs."""
    return _TWO_INDICES.pack(MessageType.RESPONSE, sender, receiver) + noise


def sender_index(datagram: bytes) -> int:
    """Return the sender index of an initiation or a response."""
    return int.from_bytes(datagram[4:8], "little")


def receiver_index(datagram: bytes) -> int:
    """Return the receiver index of a response, a cookie reply or transport data."""
    start = 8 if datagram[0] == MessageType.RESPONSE else 4
    return int.from_bytes(datagram[start : start + 4], "little")


def mac(key: bytes, data: bytes) -> bytes:
    """Return the 16-byte keyed BLAKE2s that MACs and cookies are made of."""
    return blake2s(data, key=key, digest_size=MAC_SIZE).digest()


class MacMaker:
    """What we put behind handshake messages to one peer, with the cookie that it may have given us."""

    __slots__ = ("_cookie", "_cookie_key", "_expires", "_last_mac1", "_mac1_key")

    def __init__(self, recipient: bytes) -> None:
        """Make MACs for the peer with this static public key."""
        self._mac1_key = blake2s(LABEL_MAC1 + recipient).digest()
        self._cookie_key = blake2s(LABEL_COOKIE + recipient).digest()
        self._cookie = b""
        self._expires = float("-inf")
        self._last_mac1 = b""

    def finish(self, message: bytes, now: float) -> bytes:
        """Return the message with mac1, and mac2 where a fresh cookie is held (paper, 5.4.4)."""
        self._last_mac1 = mac(self._mac1_key, message)
        message += self._last_mac1
        return message + (mac(self._cookie, message) if now < self._expires else NO_MAC)

    def take_cookie(self, reply: bytes, now: float) -> bool:
        """Keep the cookie of a reply to the message finished last; False where it is forged or not for it."""
        if not self._last_mac1:
            return False
        try:
            self._cookie = crypto_aead_xchacha20poly1305_ietf_decrypt(
                reply[32:], self._last_mac1, reply[8:32], self._cookie_key
            )
        except CryptoError:
            return False
        self._last_mac1 = b""
        self._expires = now + COOKIE_SECRET_TIME - COOKIE_SECRET_LATENCY
        return True


class MacChecker:
    """What handshake messages to us must have behind them, and the cookies we give out."""

    __slots__ = ("_cookie_key", "_mac1_key", "_random", "_secret", "_secret_ends")

    def __init__(self, own: bytes, random: Callable[[int], bytes]) -> None:
        """Check messages to the static public key `own`."""
        self._mac1_key = blake2s(LABEL_MAC1 + own).digest()
        self._cookie_key = blake2s(LABEL_COOKIE + own).digest()
        self._random = random
        self._secret = b""
        self._secret_ends = float("-inf")

    def mac1_holds(self, datagram: bytes) -> bool:
        """Tell whether the sender of an initiation or a response knows our public key."""
        end = len(datagram) - 2 * MAC_SIZE
        return hmac.compare_digest(mac(self._mac1_key, datagram[:end]), datagram[end : end + MAC_SIZE])

    def mac2_holds(self, datagram: bytes, source: bytes, now: float) -> bool:
        """Tell whether the sender can receive at `source`, the bytes of its address and port."""
        if now >= self._secret_ends:
            return False
        end = len(datagram) - MAC_SIZE
        return hmac.compare_digest(mac(self._cookie(source), datagram[:end]), datagram[end:])

    def cookie_reply(self, datagram: bytes, source: bytes, now: float) -> bytes:
        """Return the cookie reply to a message whose mac1 holds (paper, 5.4.7)."""
        if now >= self._secret_ends:
            self._secret = self._random(32)
            self._secret_ends = now + COOKIE_SECRET_TIME
        end = len(datagram) - 2 * MAC_SIZE
        nonce = self._random(NONCE_SIZE)
        sealed = crypto_aead_xchacha20poly1305_ietf_encrypt(
            self._cookie(source), datagram[end : end + MAC_SIZE], nonce, self._cookie_key
        )
        return _ONE_INDEX.pack(MessageType.COOKIE, sender_index(datagram)) + nonce + sealed

    def _cookie(self, source: bytes) -> bytes:
        return mac(self._secret, source)
