"""The sealed control message (CE 01) and its cookie reply, as docs/protocol.md, section 4 has them.

A sealed message, 92 bytes before the ciphertext:

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +---------------+---------------+---------------+---------------+
    |     0xCE      |     0x01      |   type = 1    |       0       |  0
    +---------------+---------------+---------------+---------------+
    |                 sender's control key (32 bytes)               |  4
    +---------------------------------------------------------------+
    |                        nonce (24 bytes)                       | 36
    +---------------------------------------------------------------+
    |                        mac1 (16 bytes)                        | 60
    +---------------------------------------------------------------+
    |            mac2 (16 bytes, zero without a cookie)             | 76
    +---------------------------------------------------------------+
    |              ciphertext  ...  and tag (16 bytes)              | 92
    +---------------------------------------------------------------+

A cookie reply, 76 bytes, always smaller than what it answers:

    +---------------+---------------+---------------+---------------+
    |     0xCE      |     0x01      |   type = 2    |       0       |  0
    +---------------+---------------+---------------+---------------+
    |             mac1 of the message it answers (16 bytes)         |  4
    +---------------------------------------------------------------+
    |                        nonce (24 bytes)                       | 20
    +---------------------------------------------------------------+
    |              sealed cookie (16 bytes) and tag (16 bytes)      | 44
    +---------------------------------------------------------------+

The order of work at a receiver: `Sealed.parse`, `check_mac1`, where it is asked for `check_mac2`, and only
then `PairKeys.derive`, which has the only X25519, and `open`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2s
from hmac import compare_digest
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_decrypt as aead_decrypt,
)
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_encrypt as aead_encrypt,
)
from nacl.exceptions import CryptoError

from crossedge.wire.errors import WireError
from crossedge.wire.limits import ENVELOPE_OVERHEAD, MAX_CONTROL, MAX_PLAINTEXT

__all__ = [
    "COOKIE_REPLY_SIZE",
    "ENVELOPE_OVERHEAD",
    "MAC2",
    "MAX_CONTROL",
    "MAX_PLAINTEXT",
    "NO_MAC",
    "SENDER",
    "ControlKey",
    "CookieReply",
    "PairKeys",
    "Sealed",
    "is_cookie_reply",
    "seal",
    "seal_cookie",
]

MAGIC: Final = b"\xce\x01"
SEALED_PREFIX: Final = MAGIC + b"\x01\x00"
COOKIE_PREFIX: Final = MAGIC + b"\x02\x00"
NONCE: Final = 24
MAC: Final = 16
COOKIE: Final = 16
TAG: Final = 16
HEADER: Final = 60
"""What the MACs and the seal cover of the header: all before mac1."""
BODY: Final = HEADER + 2 * MAC
COOKIE_REPLY_SIZE: Final = 4 + MAC + NONCE + COOKIE + TAG

LABEL_ENVELOPE: Final = b"crossedge/envelope/v1"
LABEL_MAC1: Final = b"crossedge/mac1/v1"
LABEL_COOKIE: Final = b"crossedge/cookie/v1"

SENDER: Final = slice(4, 36)
MAC2: Final = slice(HEADER + MAC, BODY)
"""Where a sealed datagram has them, for who must decide before it is parsed."""
NO_MAC: Final = bytes(MAC)


@lru_cache(maxsize=256)
def _mac1_key(recipient: bytes) -> bytes:
    return blake2s(LABEL_MAC1 + recipient).digest()


@lru_cache(maxsize=64)
def _cookie_key(responder: bytes) -> bytes:
    return blake2s(LABEL_COOKIE + responder).digest()


def _mac(key: bytes, header: bytes, body: bytes) -> bytes:
    return blake2s(header + body, digest_size=MAC, key=key).digest()


class ControlKey:
    """An X25519 key pair for control messages: a node's, made at each start, or a rendezvous's."""

    __slots__ = ("_key", "public")

    def __init__(self, private: bytes) -> None:
        """Take 32 private bytes; `ValueError` if they are not 32."""
        self._key = X25519PrivateKey.from_private_bytes(private)
        self.public = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, random: Callable[[int], bytes]) -> ControlKey:
        """Return a new key from `random(32)`."""
        return cls(random(32))

    @property
    def private(self) -> bytes:
        """The 32 private bytes, for whoever stores the key."""
        return self._key.private_bytes_raw()

    def exchange(self, other: bytes) -> bytes:
        """Return the X25519 shared secret; `WireError("weak-key")` for a point of low order."""
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(other))
        except ValueError:
            raise WireError("weak-key") from None

    def __repr__(self) -> str:
        return f"ControlKey(public={self.public.hex()})"


@dataclass(frozen=True, slots=True)
class PairKeys:
    """The two directional keys between an own and another control key; worth caching."""

    own: bytes
    other: bytes
    send: bytes = field(repr=False)
    receive: bytes = field(repr=False)

    @classmethod
    def derive(cls, own: ControlKey, other: bytes) -> PairKeys:
        """Return the keys for messages to and from `other`: the only X25519 of this module.

        `WireError("weak-key")` if `other` is a point of low order.
        """
        shared = own.exchange(other)
        return cls(
            own.public,
            other,
            blake2s(own.public + other + LABEL_ENVELOPE, key=shared).digest(),
            blake2s(other + own.public + LABEL_ENVELOPE, key=shared).digest(),
        )


def seal(plaintext: bytes, pair: PairKeys, nonce: bytes, cookie: bytes | None = None) -> bytes:
    """Return the datagram that carries `plaintext` to `pair.other`.

    `nonce` is 24 random bytes. `cookie` is the newest that the recipient gave out, or None. `ValueError` if
    the plaintext does not fit or a length is wrong.
    """
    if len(plaintext) > MAX_PLAINTEXT or len(nonce) != NONCE:
        raise ValueError(f"{len(plaintext)} bytes of plaintext, {len(nonce)} of nonce")
    header = SEALED_PREFIX + pair.own + nonce
    body = aead_encrypt(plaintext, header, nonce, pair.send)
    mac1 = _mac(_mac1_key(pair.other), header, body)
    mac2 = NO_MAC if cookie is None else _mac(cookie, header, body)
    return b"".join((header, mac1, mac2, body))


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed message as it came in: nothing in it is proven until the checks say so."""

    sender: bytes
    """The sender's control key."""
    nonce: bytes
    mac1: bytes
    mac2: bytes
    header: bytes
    body: bytes

    @classmethod
    def parse(cls, datagram: bytes) -> Sealed:
        """Return the parts of an untrusted datagram; raises only `WireError`."""
        if len(datagram) < BODY + TAG:
            raise WireError("truncated", "sealed message")
        if len(datagram) > MAX_CONTROL:
            raise WireError("too-long", "sealed message")
        if datagram[:4] != SEALED_PREFIX:
            raise WireError("not-sealed")
        datagram = bytes(datagram)
        return cls(
            datagram[4:36], datagram[36:60], datagram[60:76], datagram[76:92], datagram[:60], datagram[92:]
        )

    @property
    def has_mac2(self) -> bool:
        """Whether there is a mac2 to check at all."""
        return self.mac2 != NO_MAC

    def check_mac1(self, own_public: bytes) -> bool:
        """Tell whether the sender knew the key that it was sending to."""
        return compare_digest(self.mac1, _mac(_mac1_key(own_public), self.header, self.body))

    def check_mac2(self, cookie: bytes) -> bool:
        """Tell whether the sender holds this cookie."""
        return compare_digest(self.mac2, _mac(cookie, self.header, self.body))

    def open(self, pair: PairKeys) -> bytes:
        """Return the plaintext; `WireError` "wrong-sender" or "bad-tag" if it is not from `pair.other`."""
        if not compare_digest(self.sender, pair.other):
            raise WireError("wrong-sender")
        try:
            return aead_decrypt(self.body, self.header, self.nonce, pair.receive)
        except CryptoError:
            raise WireError("bad-tag") from None


def is_cookie_reply(datagram: bytes) -> bool:
    """Tell whether a control datagram is a cookie reply and not a sealed message."""
    return datagram[:4] == COOKIE_PREFIX


def seal_cookie(request: Sealed, responder: bytes, nonce: bytes, cookie: bytes) -> bytes:
    """Return the reply that gives `cookie` (16 bytes) to whoever sent `request` to the key `responder`."""
    if len(nonce) != NONCE or len(cookie) != COOKIE:
        raise ValueError(f"{len(nonce)} bytes of nonce, {len(cookie)} of cookie")
    sealed = aead_encrypt(cookie, request.mac1, nonce, _cookie_key(responder))
    return b"".join((COOKIE_PREFIX, request.mac1, nonce, sealed))


@dataclass(frozen=True, slots=True)
class CookieReply:
    """A cookie reply as it came in; `mac1` says which of our messages it answers."""

    mac1: bytes
    nonce: bytes
    sealed: bytes

    @classmethod
    def parse(cls, datagram: bytes) -> CookieReply:
        """Return the parts of an untrusted datagram; raises only `WireError`."""
        if len(datagram) != COOKIE_REPLY_SIZE or datagram[:4] != COOKIE_PREFIX:
            raise WireError("not-cookie-reply")
        datagram = bytes(datagram)
        return cls(datagram[4:20], datagram[20:44], datagram[44:])

    def open(self, responder: bytes) -> bytes:
        """Return the 16-byte cookie that the key `responder` gave; `WireError("bad-tag")` otherwise.

        The caller looks up by `mac1` that it sent such a message to that responder, and when.
        """
        try:
            return aead_decrypt(self.sealed, self.mac1, self.nonce, _cookie_key(responder))
        except CryptoError:
            raise WireError("bad-tag") from None


def mac1_of(datagram: bytes) -> bytes:
    """Return the mac1 of a sealed datagram of our own, to know its cookie reply by."""
    return datagram[HEADER : HEADER + MAC]
