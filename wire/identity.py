"""Names, keys and signatures: who somebody is, and that they said it.

A signed object on the wire is one msgpack map followed by the 64 bytes of an Ed25519 signature over the
domain string of its kind and that map:

    +---------------------------------------+------------------------+
    |      body (msgpack map)  ...          |  signature (64 bytes)  |
    +---------------------------------------+------------------------+

The bytes are kept as they came, so that an object with fields from a later version is handed on whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import blake2s
from typing import Annotated, ClassVar, Final, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nacl.bindings import crypto_sign_open
from nacl.exceptions import CryptoError
from pydantic import Field, PrivateAttr

from crossedge.wire.codec import Fields, dump, from_map, load, to_map
from crossedge.wire.errors import IdentityError, WireError

SIGNATURE: Final = 64
"""Bytes of an Ed25519 signature."""

NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$"
"""A node's name: what Kubernetes lets a node be called, up to 63 characters."""

NAME_RULE: Final = "1 to 63 of a-z, 0-9, '-' and '.', a letter or digit first and last"

LABEL_PATTERN: Final = r"^[a-z0-9]([a-z0-9._-]{0,30}[a-z0-9])?$"
"""A group or a role, up to 32 characters."""

LABEL_RULE: Final = "1 to 32 of a-z, 0-9, '-', '_' and '.', a letter or digit first and last"

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Label = Annotated[str, Field(pattern=LABEL_PATTERN)]


def is_name(text: str) -> bool:
    """Tell whether a node may be called this."""
    return text.isascii() and re.fullmatch(NAME_PATTERN[1:-1], text) is not None


def is_label(text: str) -> bool:
    """Tell whether a group may be called this."""
    return text.isascii() and re.fullmatch(LABEL_PATTERN[1:-1], text) is not None


def network_id(ca_public: bytes) -> bytes:
    """Return the 16-byte id of the network that this certificate authority (Ed25519 public key) is."""
    return blake2s(ca_public, digest_size=16).digest()


def node_id(network: bytes, name: str) -> bytes:
    """Return the 16-byte id of a node: its name within its network."""
    return blake2s(name.encode(), digest_size=16, key=network, person=b"node").digest()


def key_id(public: bytes) -> bytes:
    """Return the 8-byte id of a public key."""
    return blake2s(public, digest_size=8, person=b"keyid").digest()


def verify(public: bytes, domain: bytes, body: bytes, signature: bytes) -> None:
    """Check a signature; `IdentityError("bad-signature")` if it is none."""
    try:
        crypto_sign_open(signature + domain + body, public)
    except (CryptoError, ValueError):
        raise IdentityError("bad-signature", domain.decode()) from None


class SigningKey:
    """An Ed25519 key pair: a certificate authority's, a node's, or one that may only revoke."""

    __slots__ = ("_key", "public")

    def __init__(self, seed: bytes) -> None:
        """Take the 32 private bytes; `ValueError` if they are not 32."""
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, random: Callable[[int], bytes]) -> SigningKey:
        """Return a new key from `random(32)`."""
        return cls(random(32))

    @property
    def seed(self) -> bytes:
        """The 32 private bytes, for whoever stores the key."""
        return self._key.private_bytes_raw()

    def sign(self, domain: bytes, body: bytes) -> bytes:
        """Return the 64-byte signature of a body under its domain string."""
        return self._key.sign(domain + body)

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public.hex()})"


class Signed(Fields):
    """An object whose encoded form carries a signature."""

    DOMAIN: ClassVar[bytes]
    """What the signature is for, so that one kind can never pass for another."""

    LIMIT: ClassVar[int]
    """Bytes of the largest encoded form."""

    _encoded: bytes = PrivateAttr(default=b"")

    def sign(self, key: SigningKey) -> Self:
        """Return the same object, signed; `ValueError` if it is too large."""
        body = dump(to_map(self))
        encoded = body + key.sign(self.DOMAIN, body)
        if len(encoded) > self.LIMIT:
            raise ValueError(f"{type(self).__name__} takes {len(encoded)} bytes, {self.LIMIT} are allowed")
        signed = self.model_copy()
        signed._encoded = encoded
        return signed

    def encode(self) -> bytes:
        """Return the signed bytes; `ValueError` if it was never signed."""
        if not self._encoded:
            raise ValueError(f"{type(self).__name__} is not signed")
        return self._encoded

    @classmethod
    def decode(cls, encoded: bytes) -> Self:
        """Return the object in untrusted bytes, its signature not checked; raises only `WireError`."""
        if len(encoded) <= SIGNATURE:
            raise WireError("truncated", cls.__name__)
        if len(encoded) > cls.LIMIT:
            raise WireError("too-long", f"{cls.__name__}: {len(encoded)} bytes, {cls.LIMIT} allowed")
        encoded = bytes(encoded)
        signed = from_map(cls, load(encoded[:-SIGNATURE], cls.LIMIT))
        signed._encoded = encoded
        return signed

    def check_signature(self, public: bytes) -> None:
        """Check that `public` signed this; `IdentityError("bad-signature")` otherwise."""
        encoded = self.encode()
        verify(public, self.DOMAIN, encoded[:-SIGNATURE], encoded[-SIGNATURE:])

    @property
    def fingerprint(self) -> bytes:
        """The 16-byte hash of the encoded form."""
        return blake2s(self.encode(), digest_size=16, person=b"print").digest()
