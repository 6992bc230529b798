"""Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s: the handshake of WireGuard, as the Noise specification writes it.

The pattern (Noise specification, revision 34, 7.5 and 9.4):

    <- s
    ...
    -> e, es, s, ss      with a payload: WireGuard's timestamp
    <- e, ee, se, psk    with a payload: WireGuard's is empty

This file knows Noise only: messages are what Noise calls them, without WireGuard's headers and MACs. A
response that cannot be opened raises `NoiseError` and changes nothing: a forger cannot end a handshake.
"""

from __future__ import annotations

import hmac
from hashlib import blake2s

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from crossedge.meshd.constants import CONSTRUCTION, IDENTIFIER, KEY_SIZE, TAG_SIZE

EPHEMERAL_END = KEY_SIZE
STATIC_END = EPHEMERAL_END + KEY_SIZE + TAG_SIZE
_ZERO_NONCE = bytes(12)  # every handshake key seals one message


class NoiseError(Exception):
    """A handshake message that is forged, damaged or made with a weak key."""


def kdf(count: int, key: bytes, material: bytes) -> list[bytes]:
    """Return `count` (1 to 3) keys of 32 bytes: HKDF with HMAC-BLAKE2s (paper, 5.4; Noise, 4.3)."""
    secret = hmac.digest(key, material, blake2s)
    block = b""
    blocks = []
    for number in range(1, count + 1):
        block = hmac.digest(secret, block + bytes([number]), blake2s)
        blocks.append(block)
    return blocks


class PrivateKey:
    """An X25519 private key with its public half worked out once."""

    __slots__ = ("_key", "public")

    def __init__(self, private: bytes) -> None:
        """Take 32 random bytes; X25519 clamps them itself."""
        self._key = X25519PrivateKey.from_private_bytes(private)
        self.public = self._key.public_key().public_bytes_raw()

    def exchange(self, public: bytes) -> bytes:
        """Return the shared secret with another public key; NoiseError where it would be zero."""
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise NoiseError("weak public key") from None


class Symmetric:
    """The chaining key and the transcript hash of one handshake (Noise, 5.2)."""

    __slots__ = ("chain", "hash")

    def __init__(self, chain: bytes, transcript: bytes) -> None:
        self.chain = chain
        self.hash = transcript

    @classmethod
    def start(cls, prologue: bytes, responder: bytes) -> Symmetric:
        """Return the state before the first message: names and the responder's static key are mixed in."""
        chain = blake2s(CONSTRUCTION).digest()
        state = cls(chain, chain)
        state.mix_hash(prologue)
        state.mix_hash(responder)
        return state

    def copy(self) -> Symmetric:
        """Return a copy to try a message on."""
        return Symmetric(self.chain, self.hash)

    def mix_hash(self, data: bytes) -> None:
        """Add what was sent in clear to the transcript."""
        self.hash = blake2s(self.hash + data).digest()

    def mix_public(self, ephemeral: bytes) -> None:
        """Add an ephemeral public key to transcript and chain, as psk patterns do (Noise, 9.2)."""
        self.mix_hash(ephemeral)
        (self.chain,) = kdf(1, self.chain, ephemeral)

    def mix_secret(self, secret: bytes) -> bytes:
        """Add a shared secret to the chain; return the key that seals the next field."""
        self.chain, key = kdf(2, self.chain, secret)
        return key

    def mix_psk(self, psk: bytes) -> bytes:
        """Add the pre-shared key to chain and transcript; return the key that seals the next field."""
        self.chain, mixed, key = kdf(3, self.chain, psk)
        self.mix_hash(mixed)
        return key

    def seal(self, key: bytes, plaintext: bytes) -> bytes:
        """Seal a field with the transcript as associated data, then add it to the transcript."""
        sealed = ChaCha20Poly1305(key).encrypt(_ZERO_NONCE, plaintext, self.hash)
        self.mix_hash(sealed)
        return sealed

    def open(self, key: bytes, sealed: bytes) -> bytes:
        """Open a field, then add it to the transcript; NoiseError where it is forged."""
        try:
            plaintext = ChaCha20Poly1305(key).decrypt(_ZERO_NONCE, sealed, self.hash)
        except InvalidTag:
            raise NoiseError("forged field") from None
        self.mix_hash(sealed)
        return plaintext

    def split(self) -> tuple[bytes, bytes]:
        """Return the transport keys: the initiator's for sending, then the responder's (Noise, 5.2)."""
        first, second = kdf(2, self.chain, b"")
        return first, second


class Initiator:
    """One handshake that we start: `write` once, then `read` until a response opens."""

    __slots__ = ("_ephemeral", "_psk", "_remote", "_state", "_static", "_static_static", "transcript")

    def __init__(
        self,
        static: PrivateKey,
        remote: bytes,
        psk: bytes,
        *,
        prologue: bytes = IDENTIFIER,
        static_static: bytes | None = None,
    ) -> None:
        """Aim at the peer with the static key `remote`; `static_static`, their DH, may be known already."""
        self._static = static
        self._remote = remote
        self._psk = psk
        self._static_static = static_static
        self._ephemeral: PrivateKey | None = None
        self._state = Symmetric.start(prologue, remote)
        self.transcript = b""

    def write(self, ephemeral: bytes, payload: bytes) -> bytes:
        """Return the first message, with an ephemeral private key of 32 random bytes."""
        state = self._state
        key = self._ephemeral = PrivateKey(ephemeral)
        state.mix_public(key.public)
        sealed_static = state.seal(state.mix_secret(key.exchange(self._remote)), self._static.public)
        shared = self._static_static or self._static.exchange(self._remote)
        return key.public + sealed_static + state.seal(state.mix_secret(shared), payload)

    def read(self, message: bytes) -> tuple[bytes, bytes, bytes]:
        """Open the second message: (payload, key to send with, key to receive with), or NoiseError."""
        if self._ephemeral is None or len(message) < EPHEMERAL_END + TAG_SIZE:
            raise NoiseError("not a response")
        state = self._state.copy()
        remote = message[:EPHEMERAL_END]
        state.mix_public(remote)
        state.mix_secret(self._ephemeral.exchange(remote))
        state.mix_secret(self._static.exchange(remote))
        payload = state.open(state.mix_psk(self._psk), message[EPHEMERAL_END:])
        self._state = state
        self.transcript = state.hash
        send, receive = state.split()
        return payload, send, receive


class Responder:
    """One handshake that somebody else starts: `read_static`, `read_payload`, `write`."""

    __slots__ = ("_message", "_remote_ephemeral", "_state", "_static", "remote", "transcript")

    def __init__(self, static: PrivateKey, *, prologue: bytes = IDENTIFIER) -> None:
        self._static = static
        self._state = Symmetric.start(prologue, static.public)
        self._message = b""
        self._remote_ephemeral = b""
        self.remote = b""
        self.transcript = b""

    def read_static(self, message: bytes) -> bytes:
        """Return who claims to have written the first message; proof comes with `read_payload`."""
        if len(message) < STATIC_END + TAG_SIZE:
            raise NoiseError("not an initiation")
        state = self._state
        self._message = message
        self._remote_ephemeral = message[:EPHEMERAL_END]
        state.mix_public(self._remote_ephemeral)
        key = state.mix_secret(self._static.exchange(self._remote_ephemeral))
        self.remote = state.open(key, message[EPHEMERAL_END:STATIC_END])
        return self.remote

    def read_payload(self, static_static: bytes | None = None) -> bytes:
        """Return the payload of the first message; its writer is who it claimed to be."""
        key = self._state.mix_secret(static_static or self._static.exchange(self.remote))
        return self._state.open(key, self._message[STATIC_END:])

    def write(self, ephemeral: bytes, psk: bytes, payload: bytes = b"") -> tuple[bytes, bytes, bytes]:
        """Return (second message, key to send with, key to receive with)."""
        state = self._state
        key = PrivateKey(ephemeral)
        state.mix_public(key.public)
        state.mix_secret(key.exchange(self._remote_ephemeral))
        state.mix_secret(key.exchange(self.remote))
        message = key.public + state.seal(state.mix_psk(psk), payload)
        self.transcript = state.hash
        receive, send = state.split()
        return message, send, receive
