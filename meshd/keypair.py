"""The two transport keys that one handshake gave, their counters and their replay windows.

A transport message (paper, 5.4.6), little-endian:

    0        1                 4                  8                          16
    +--------+-----------------+------------------+--------------------------+------------------------------+
    | type 4 | 0 0 0           | receiver index   | counter u64              | ciphertext, 16 bytes of tag  |
    +--------+-----------------+------------------+--------------------------+------------------------------+

The nonce is four zero bytes and the counter, the associated data is empty. Superframes (two meshds only)
use keys of their own, derived from the transport keys, with counters and a replay window of their own.
"""

from __future__ import annotations

import hmac
import struct
from hashlib import blake2s
from typing import Any, Final, Literal, NoReturn, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from crossedge.meshd.constants import (
    PADDING,
    REJECT_AFTER_MESSAGES,
    REJECT_AFTER_TIME,
    SUPERFRAME_LABEL,
    TRANSPORT_HEADER,
    TRANSPORT_OVERHEAD,
    MessageType,
)
from crossedge.meshd.growth import Tally
from crossedge.meshd.replay import ReplayWindow

Aead = AESGCM | ChaCha20Poly1305
AeadName = Literal["aes-256-gcm", "chacha20-poly1305"]
AEADS: Final[dict[AeadName, type[AESGCM] | type[ChaCha20Poly1305]]] = {
    "aes-256-gcm": AESGCM,
    "chacha20-poly1305": ChaCha20Poly1305,
}
HEADER = struct.Struct("<IIQ")  # type and three zeros, receiver index, counter
NONCE = struct.Struct("<4xQ")  # paper, 5.4.6; the superframes' nonces are made the same way


class CounterExhaustedError(Exception):
    """A keypair has no counter left, or was erased: it must not seal anything any more."""


def superframe_key(transport_key: bytes, aead: AeadName) -> bytes:
    """Return the 32-byte superframe key that belongs to a transport key: WireGuard's KDF with our label."""
    label = SUPERFRAME_LABEL + aead.encode()
    extracted = hmac.digest(transport_key, label, blake2s)
    return hmac.digest(extracted, b"\x01", blake2s)


class _ErasedCipher:
    """What stands where a key was: it opens nothing, and refuses to seal."""

    def encrypt(self, *_: Any) -> NoReturn:
        raise CounterExhaustedError

    def decrypt(self, *_: Any) -> NoReturn:
        raise InvalidTag

    encrypt_into = encrypt
    decrypt_into = decrypt


_ERASED: Final = cast(ChaCha20Poly1305, _ErasedCipher())


class Keypair:
    """What a completed handshake left: one key per direction. Made by `noise`, owned by a `Session`."""

    __slots__ = (
        "aead",
        "chunk_counter",
        "chunk_replay",
        "chunks_receive",
        "chunks_send",
        "created",
        "erased",
        "initiator",
        "local_index",
        "receive",
        "receive_key",
        "remote_index",
        "replay",
        "send",
        "send_counter",
        "send_key",
        "tally",
    )

    def __init__(
        self,
        *,
        local_index: int,
        remote_index: int,
        created: float,
        initiator: bool,
        send_key: bytes,
        receive_key: bytes,
    ) -> None:
        """Take the keys of both directions; `created` is the `now` of the handshake's end, in seconds."""
        self.local_index = local_index
        self.remote_index = remote_index
        self.created = created
        self.initiator = initiator
        self.send_key = send_key
        self.receive_key = receive_key
        self.send = ChaCha20Poly1305(send_key)
        self.receive = ChaCha20Poly1305(receive_key)
        self.send_counter = 0
        self.replay = ReplayWindow()
        self.aead: AeadName | None = None
        self.chunks_send: Aead | None = None
        self.chunks_receive: Aead | None = None
        self.chunk_counter = 0
        self.chunk_replay = ReplayWindow()
        self.tally = Tally()
        self.erased = False

    def reserve(self, count: int = 1) -> int:
        """Return the first of `count` transport counters that are now the caller's; none is given twice."""
        first = self.send_counter
        if first + count > REJECT_AFTER_MESSAGES:
            raise CounterExhaustedError
        self.send_counter = first + count
        return first

    def reserve_chunks(self, count: int) -> int:
        """Return the first of `count` superframe counters that are now the caller's; none is given twice."""
        first = self.chunk_counter
        if first + count > REJECT_AFTER_MESSAGES:
            raise CounterExhaustedError
        self.chunk_counter = first + count
        return first

    def alive(self, now: float) -> bool:
        """Tell whether the keypair is young enough to be used in either direction (paper, 6.2)."""
        return now - self.created < REJECT_AFTER_TIME

    def can_send(self, now: float) -> bool:
        """Tell whether the keypair may seal one more message: neither too old nor used up (paper, 6.2)."""
        return (
            now - self.created < REJECT_AFTER_TIME
            and self.send_counter < REJECT_AFTER_MESSAGES
            and self.chunk_counter < REJECT_AFTER_MESSAGES
        )

    def enable_superframes(self, aead: AeadName) -> None:
        """Derive the superframe keys of both directions; asked again for the same AEAD it changes nothing.

        Raises ValueError where another AEAD was enabled before, KeyError where the name is unknown.
        """
        if self.erased or self.aead == aead:
            return
        if self.aead is not None:
            raise ValueError(f"superframes are enabled with {self.aead} already")
        cipher = AEADS[aead]
        self.chunks_send = cipher(superframe_key(self.send_key, aead))
        self.chunks_receive = cipher(superframe_key(self.receive_key, aead))
        self.aead = aead

    def erase(self) -> None:
        """Let go of the keys (paper, 6.3): nothing can be sealed or opened with this keypair any more.

        Python cannot promise that no copy of the bytes stays in freed memory; no reference to them does.
        """
        if self.erased:
            return
        self.erased = True
        self.created = float("-inf")
        self.send_counter = self.chunk_counter = REJECT_AFTER_MESSAGES
        self.replay.close()
        self.chunk_replay.close()
        self.send_key = self.receive_key = b""
        self.chunks_send = self.chunks_receive = None
        self.send = self.receive = _ERASED


def seal_transport(keypair: Keypair, plaintext: bytes, *, pad: bool = True) -> bytes:
    """Return a finished transport message; for keepalives (empty) and in-session messages, not for bulk.

    With `pad` the plaintext grows by zeros to a multiple of 16 (paper, 5.4.6). Raises CounterExhaustedError.
    """
    if pad:
        plaintext += bytes(-len(plaintext) % PADDING)
    counter = keypair.reserve()
    header = HEADER.pack(MessageType.TRANSPORT, keypair.remote_index, counter)
    return header + keypair.send.encrypt(NONCE.pack(counter), plaintext, None)


def open_transport(keypair: Keypair, datagram: bytes) -> bytes | None:
    """Return the plaintext of a transport message for this keypair, or None where it is forged or replayed.

    The caller found the keypair by the receiver index and asked `alive`. A failed open consumes no counter.
    """
    if len(datagram) < TRANSPORT_OVERHEAD:
        return None
    _, _, counter = HEADER.unpack_from(datagram)
    if not keypair.replay.check(counter):
        return None
    try:
        plaintext = keypair.receive.decrypt(NONCE.pack(counter), datagram[TRANSPORT_HEADER:], None)
    except InvalidTag:
        return None
    keypair.replay.commit(counter)
    return plaintext
