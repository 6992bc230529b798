"""Keypairs: counters, superframe keys, and what is left after they are erased."""

from __future__ import annotations

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hashes import BLAKE2s
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from crossedge.meshd.keypair import (
    AEADS,
    AeadName,
    CounterExhaustedError,
    Keypair,
    seal_transport,
    superframe_key,
)


def keypairs() -> tuple[Keypair, Keypair]:
    """Both ends of one keypair."""
    ends = ((b"a" * 32, b"b" * 32), (b"b" * 32, b"a" * 32))
    first, second = (
        Keypair(
            local_index=1, remote_index=2, created=0.0, initiator=True, send_key=send, receive_key=receive
        )
        for send, receive in ends
    )
    return first, second


def test_reserved_counters_are_never_given_twice() -> None:
    keypair, _ = keypairs()
    assert [keypair.reserve(), keypair.reserve(64), keypair.reserve()] == [0, 1, 65]
    assert [keypair.reserve_chunks(3), keypair.reserve_chunks(1)] == [0, 3]


@pytest.mark.parametrize("aead", ["aes-256-gcm", "chacha20-poly1305"])
def test_superframe_keys_agree_and_are_keys_of_their_own(aead: AeadName) -> None:
    one, two = keypairs()
    one.enable_superframes(aead)
    two.enable_superframes(aead)
    assert one.chunks_send is not None
    assert one.chunks_receive is not None
    assert two.chunks_send is not None
    assert two.chunks_receive is not None
    nonce = bytes(12)
    sealed = one.chunks_send.encrypt(nonce, b"record", b"header")
    assert two.chunks_receive.decrypt(nonce, sealed, b"header") == b"record"
    assert two.chunks_send.encrypt(nonce, b"record", b"header") != sealed
    assert one.send.encrypt(nonce, b"record", b"header") != sealed


def test_superframe_key_is_an_hkdf_of_the_transport_key() -> None:
    """RFC 5869 with HMAC-BLAKE2s, worked out by the library's own HKDF."""
    for aead in AEADS:
        label = b"crossedge/superframe/v1/" + aead.encode()
        expected = HKDF(BLAKE2s(32), 32, salt=b"k" * 32, info=b"").derive(label)
        assert superframe_key(b"k" * 32, aead) == expected


def test_superframes_are_enabled_once() -> None:
    keypair, _ = keypairs()
    keypair.enable_superframes("aes-256-gcm")
    cipher = keypair.chunks_send
    keypair.reserve_chunks(5)
    keypair.enable_superframes("aes-256-gcm")
    assert keypair.chunks_send is cipher
    assert keypair.chunk_counter == 5
    with pytest.raises(ValueError, match="aes-256-gcm"):
        keypair.enable_superframes("chacha20-poly1305")


def test_erased_keypair_seals_and_accepts_nothing() -> None:
    keypair, other = keypairs()
    sealed = other.send.encrypt(bytes(12), b"data", None)
    keypair.enable_superframes("aes-256-gcm")
    keypair.erase()
    keypair.erase()
    assert not keypair.can_send(0.0)
    assert not keypair.alive(0.0)
    assert not keypair.replay.check(0)
    assert not keypair.chunk_replay.check_range(0, 64)
    assert keypair.chunks_send is keypair.chunks_receive is None
    with pytest.raises(InvalidTag):
        keypair.receive.decrypt_into(bytes(12), sealed, None, bytearray(4))
    with pytest.raises(CounterExhaustedError):
        keypair.send.encrypt(bytes(12), b"data", None)
    for reserve in (keypair.reserve, keypair.reserve_chunks):
        with pytest.raises(CounterExhaustedError):
            reserve(1)
    keypair.enable_superframes("aes-256-gcm")
    assert keypair.chunks_send is None


def test_small_messages_are_padded_to_16_bytes_unless_their_size_matters() -> None:
    keypair, _ = keypairs()
    assert [len(seal_transport(keypair, bytes(n))) - 32 for n in (0, 1, 16, 17)] == [0, 16, 16, 32]
    assert len(seal_transport(keypair, bytes(17), pad=False)) == 32 + 17
