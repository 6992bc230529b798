"""The sealed control message and its cookie reply, also against a second implementation from the text."""

from __future__ import annotations

from hashlib import blake2s

import pytest
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_encrypt,
    crypto_scalarmult,
    crypto_scalarmult_base,
)

from crossedge.wire.envelope import (
    COOKIE_REPLY_SIZE,
    ENVELOPE_OVERHEAD,
    MAX_CONTROL,
    MAX_PLAINTEXT,
    ControlKey,
    CookieReply,
    PairKeys,
    Sealed,
    is_cookie_reply,
    mac1_of,
    seal,
    seal_cookie,
)
from crossedge.wire.errors import WireError

ALICE, BOB = ControlKey(b"\x01" * 32), ControlKey(b"\x02" * 32)
TO_BOB, TO_ALICE = PairKeys.derive(ALICE, BOB.public), PairKeys.derive(BOB, ALICE.public)
NONCE = bytes(range(24))
COOKIE = b"sixteen byte jar"

GOLDEN = (
    "ce010100a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209"
    "000102030405060708090a0b0c0d0e0f1011121314151617"
    "804de7140b7e7a53c221b4ab96215b47"
    "3c0768f7411dacd28530f6b0c41b170e"
    "93cbabbdd5bcc880029a349b145906509ba5f753f7"
)
GOLDEN_COOKIE = (
    "ce010200804de7140b7e7a53c221b4ab96215b47"
    "000102030405060708090a0b0c0d0e0f1011121314151617"
    "9894cd89aa25146293039b3b79e4eb895d05cf7b3908e1d716aee57b3846f5a3"
)

LOW_ORDER = (  # RFC 7748, 6.1: the results are all zero
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
)


def written_from_the_text(plaintext: bytes, cookie: bytes | None) -> bytes:
    """Seal from Alice to Bob as docs/protocol.md says, by primitives alone."""
    alice, bob = b"\x01" * 32, b"\x02" * 32
    alice_public, bob_public = crypto_scalarmult_base(alice), crypto_scalarmult_base(bob)
    shared = crypto_scalarmult(alice, bob_public)
    key = blake2s(alice_public + bob_public + b"crossedge/envelope/v1", key=shared, digest_size=32).digest()
    header = b"\xce\x01\x01\x00" + alice_public + NONCE
    body = crypto_aead_xchacha20poly1305_ietf_encrypt(plaintext, header, NONCE, key)
    mac1_key = blake2s(b"crossedge/mac1/v1" + bob_public).digest()
    mac1 = blake2s(header + body, key=mac1_key, digest_size=16).digest()
    mac2 = blake2s(header + body, key=cookie, digest_size=16).digest() if cookie else bytes(16)
    return header + mac1 + mac2 + body


@pytest.mark.parametrize("cookie", [None, COOKIE])
def test_second_implementation_seals_the_same(cookie: bytes | None) -> None:
    assert seal(b"hello", TO_BOB, NONCE, cookie) == written_from_the_text(b"hello", cookie)


def test_golden_sealed_message() -> None:
    datagram = seal(b"hello", TO_BOB, NONCE, COOKIE)
    assert datagram.hex() == GOLDEN
    assert len(datagram) == 5 + ENVELOPE_OVERHEAD


def test_golden_cookie_reply() -> None:
    request = Sealed.parse(seal(b"hello", TO_BOB, NONCE))
    reply = seal_cookie(request, BOB.public, NONCE, COOKIE)
    assert reply.hex() == GOLDEN_COOKIE
    assert len(reply) == COOKIE_REPLY_SIZE


def test_sealed_message_opens_after_its_macs() -> None:
    sealed = Sealed.parse(seal(b"hello", TO_BOB, NONCE, COOKIE))
    assert sealed.sender == ALICE.public
    assert sealed.check_mac1(BOB.public)
    assert sealed.has_mac2
    assert sealed.check_mac2(COOKIE)
    assert not sealed.check_mac2(b"another 16 bytes")
    assert sealed.open(TO_ALICE) == b"hello"


def test_message_without_a_cookie_says_so() -> None:
    assert not Sealed.parse(seal(b"hello", TO_BOB, NONCE)).has_mac2


def test_message_for_another_fails_its_mac1() -> None:
    assert not Sealed.parse(seal(b"hello", TO_BOB, NONCE)).check_mac1(ALICE.public)


def test_reflected_message_does_not_open() -> None:
    sealed = Sealed.parse(seal(b"hello", TO_BOB, NONCE))
    with pytest.raises(WireError, match="wrong-sender"):
        sealed.open(TO_BOB)
    disguised = Sealed(BOB.public, sealed.nonce, sealed.mac1, sealed.mac2, sealed.header, sealed.body)
    with pytest.raises(WireError, match="bad-tag"):
        disguised.open(TO_BOB)


@pytest.mark.parametrize("at", [*range(4, 60, 7), 92, 96, 112])
def test_any_changed_byte_fails_both_macs_and_the_seal(at: int) -> None:
    datagram = bytearray(seal(b"hello", TO_BOB, NONCE, COOKIE))
    datagram[at] ^= 1
    sealed = Sealed.parse(bytes(datagram))
    assert not sealed.check_mac1(BOB.public)
    assert not sealed.check_mac2(COOKIE)
    with pytest.raises(WireError):
        sealed.open(TO_ALICE)


@pytest.mark.parametrize("point", LOW_ORDER)
def test_point_of_low_order_is_a_weak_key(point: str) -> None:
    with pytest.raises(WireError) as raised:
        PairKeys.derive(ALICE, bytes.fromhex(point))
    assert raised.value.reason == "weak-key"


def test_key_of_a_wrong_length_is_a_weak_key() -> None:
    with pytest.raises(WireError, match="weak-key"):
        PairKeys.derive(ALICE, bytes(31))


def test_cookie_reply_is_smaller_than_any_message_and_opens_for_its_asker() -> None:
    datagram = seal(b"", TO_BOB, NONCE)
    reply = seal_cookie(Sealed.parse(datagram), BOB.public, NONCE, COOKIE)
    assert len(reply) < len(datagram)
    assert is_cookie_reply(reply)
    assert not is_cookie_reply(datagram)
    parsed = CookieReply.parse(reply)
    assert parsed.mac1 == mac1_of(datagram)
    assert parsed.open(BOB.public) == COOKIE
    with pytest.raises(WireError, match="bad-tag"):
        parsed.open(ALICE.public)
    with pytest.raises(WireError, match="bad-tag"):
        CookieReply(bytes(16), parsed.nonce, parsed.sealed).open(BOB.public)


def test_parsers_bound_what_they_take() -> None:
    datagram = seal(bytes(MAX_PLAINTEXT), TO_BOB, NONCE)
    assert len(datagram) == MAX_CONTROL
    Sealed.parse(datagram)
    for wrong in (datagram + b"\0", datagram[:107], b"", b"\xce\x01\x01\x01" + datagram[4:]):
        with pytest.raises(WireError):
            Sealed.parse(wrong)
    for wrong in (datagram, b"", b"\xce\x01\x02\x00" + bytes(71), b"\xce\x01\x02\x00" + bytes(73)):
        with pytest.raises(WireError):
            CookieReply.parse(wrong)


def test_too_much_plaintext_is_the_callers_fault() -> None:
    with pytest.raises(ValueError, match="bytes of plaintext"):
        seal(bytes(MAX_PLAINTEXT + 1), TO_BOB, NONCE)
    with pytest.raises(ValueError, match="of nonce"):
        seal(b"", TO_BOB, NONCE[:12])


def test_private_keys_are_not_shown() -> None:
    key = ControlKey.generate(lambda size: b"\x42" * size)
    assert key.private == b"\x42" * 32
    assert "42" * 32 not in repr(key)
    assert TO_BOB.send.hex() not in repr(TO_BOB)
    assert repr(TO_BOB.send) not in repr(TO_BOB)
