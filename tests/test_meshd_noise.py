"""The handshake against figures that our own code did not make."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from hashlib import blake2s
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_encrypt

from crossedge.meshd.keypair import Keypair, open_transport
from crossedge.meshd.noise import Initiator, NoiseError, PrivateKey, Responder, kdf
from crossedge.meshd.wireguard import (
    INITIATION_NOISE,
    RESPONSE_NOISE,
    MacChecker,
    MacMaker,
    handshake_type,
    pack_initiation,
    pack_response,
)

VECTORS = Path(__file__).parent / "vectors"


def load(name: str, key: str) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = json.loads((VECTORS / name).read_text())[key]
    return values


def unhex(value: str) -> bytes:
    return bytes.fromhex(value)


def scripted(*values: bytes) -> Callable[[int], bytes]:
    """Randomness that was written down before."""
    rest = list(values)

    def random(size: int) -> bytes:
        value = rest.pop(0)
        assert len(value) == size
        return value

    return random


# --- What everything stands on --------------------------------------------------------------------------


def test_blake2s_is_that_of_rfc_7693() -> None:
    """Appendix B, and the self-test of appendix E with keys and every interesting length."""
    abc = "508c5e8c327c14e2e1a72ba34eeb452f37458b209ed63a294d999b4c86675982"
    assert blake2s(b"abc").hexdigest() == abc

    def sequence(size: int, seed: int) -> bytes:
        a, b, out = 0xDEAD4BAD * seed & 0xFFFFFFFF, 1, bytearray()
        for _ in range(size):
            a, b = b, a + b & 0xFFFFFFFF
            out.append(b >> 24)
        return bytes(out)

    total = blake2s()
    for size in (16, 20, 28, 32):
        for length in (0, 3, 64, 65, 255, 1024):
            data = sequence(length, length)
            total.update(blake2s(data, digest_size=size).digest())
            total.update(blake2s(data, digest_size=size, key=sequence(size, size)).digest())
    assert total.hexdigest() == "6a411f08ce25adcdfb02aba641451cec53c598b24f4fc787fbdc88797f4c1dfe"


def test_x25519_is_that_of_rfc_7748() -> None:
    """Section 6.1."""
    alice = PrivateKey(unhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"))
    bob = PrivateKey(unhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert alice.public.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert bob.public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert alice.exchange(bob.public).hex() == bob.exchange(alice.public).hex() == shared


def test_xchacha20_poly1305_is_that_of_the_draft() -> None:
    """draft-irtf-cfrg-xchacha, appendix A.3.1."""
    key = bytes(range(0x80, 0xA0))
    nonce = bytes(range(0x40, 0x58))
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it."
    )
    sealed = crypto_aead_xchacha20poly1305_ietf_encrypt(text, unhex("50515253c0c1c2c3c4c5c6c7"), nonce, key)
    assert sealed.hex().startswith("bd6d179d3e83d43b9576579493c0e939572a1700252bfaccbed2902c21396cbb")
    assert sealed.hex().endswith("c0875924c1c7987947deafd8780acf49")


@pytest.mark.parametrize("vector", load("wireguard_kdf.json", "vectors"), ids=lambda v: v["key"] or "empty")
def test_kdf_gives_the_figures_of_wireguard_go(vector: dict[str, str]) -> None:
    key, material = unhex(vector["key"]), unhex(vector["input"])
    expected = [unhex(vector[name]) for name in ("t0", "t1", "t2")]
    for count in (1, 2, 3):
        assert kdf(count, key, material) == expected[:count]


# --- Noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", load("noise_ikpsk2.json", "vectors"), ids=lambda v: v["origin"])
def test_noise_vector(vector: dict[str, Any]) -> None:
    prologue, psk = unhex(vector["prologue"]), unhex(vector["psk"])
    ours, theirs = (
        PrivateKey(unhex(vector["initiator_static"])),
        PrivateKey(unhex(vector["responder_static"])),
    )
    if vector["responder_public"]:
        assert theirs.public.hex() == vector["responder_public"]
    messages = [(unhex(payload), unhex(wire)) for payload, wire in vector["messages"]]

    initiator = Initiator(ours, theirs.public, psk, prologue=prologue)
    assert initiator.write(unhex(vector["initiator_ephemeral"]), messages[0][0]) == messages[0][1]

    responder = Responder(theirs, prologue=prologue)
    assert responder.read_static(messages[0][1]) == ours.public
    assert responder.read_payload() == messages[0][0]
    answer, send, receive = responder.write(unhex(vector["responder_ephemeral"]), psk, messages[1][0])
    assert answer == messages[1][1]

    assert initiator.read(answer) == (messages[1][0], receive, send)
    assert initiator.transcript == responder.transcript
    if vector["handshake_hash"]:
        assert initiator.transcript.hex() == vector["handshake_hash"]
    for number, (payload, wire) in enumerate(messages[2:]):
        key = (receive, send)[number % 2]
        assert ChaCha20Poly1305(key).encrypt(struct.pack("<4xQ", number // 2), payload, None) == wire


def handshake() -> tuple[Initiator, Responder, bytes]:
    ours, theirs = PrivateKey(b"\1" * 32), PrivateKey(b"\2" * 32)
    initiator = Initiator(ours, theirs.public, bytes(32))
    return initiator, Responder(theirs), initiator.write(b"\3" * 32, b"t" * 12)


def test_damage_at_any_byte_of_an_initiation_is_noticed() -> None:
    def read(message: bytes) -> bytes:
        responder = Responder(PrivateKey(b"\2" * 32))
        responder.read_static(message)
        return responder.read_payload()

    _, _, message = handshake()
    assert read(message) == b"t" * 12
    for position in range(len(message)):
        damaged = bytearray(message)
        damaged[position] ^= 1
        with pytest.raises(NoiseError):
            read(bytes(damaged))


def test_forged_response_does_not_end_the_handshake() -> None:
    initiator, responder, message = handshake()
    responder.read_static(message)
    responder.read_payload()
    answer, send, receive = responder.write(b"\4" * 32, bytes(32))
    for position in range(len(answer)):
        damaged = bytearray(answer)
        damaged[position] ^= 1
        with pytest.raises(NoiseError):
            initiator.read(bytes(damaged))
    assert initiator.read(answer) == (b"", receive, send)


def test_other_psk_is_noticed_at_the_response() -> None:
    initiator, responder, message = handshake()
    responder.read_static(message)
    responder.read_payload()
    answer, _, _ = responder.write(b"\4" * 32, b"\1" * 32)
    with pytest.raises(NoiseError):
        initiator.read(answer)


@pytest.mark.parametrize("weak", [bytes(32), b"\1" + bytes(31)])
def test_weak_public_key_is_refused(weak: bytes) -> None:
    _, _, message = handshake()
    with pytest.raises(NoiseError):
        Responder(PrivateKey(b"\2" * 32)).read_static(weak + message[32:])
    with pytest.raises(NoiseError):
        PrivateKey(b"\1" * 32).exchange(weak)


# --- WireGuard: what wireguard-go said to itself ---------------------------------------------------------

TRANSCRIPTS = load("wireguard_transcripts.json", "transcripts")
transcripts = pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=["no psk", "psk"])


def keys(transcript: dict[str, Any]) -> tuple[PrivateKey, PrivateKey, bytes]:
    ours = PrivateKey(unhex(transcript["initiator_private"]))
    theirs = PrivateKey(unhex(transcript["responder_private"]))
    assert ours.public.hex() == transcript["initiator_public"]
    assert theirs.public.hex() == transcript["responder_public"]
    return ours, theirs, unhex(transcript["psk"])


@transcripts
def test_our_initiations_are_byte_for_byte_those_of_wireguard_go(transcript: dict[str, Any]) -> None:
    ours, theirs, psk = keys(transcript)
    macs = MacMaker(theirs.public)
    first, cookie, second = (transcript[name] for name in ("unanswered_initiation", "cookie", "initiation"))
    for record in (first, second):
        initiator = Initiator(ours, theirs.public, psk)
        noise = initiator.write(unhex(record["ephemeral_private"]), unhex(record["timestamp"]))
        datagram = macs.finish(pack_initiation(record["sender"], noise), 100.0)
        assert datagram.hex() == record["datagram"]
        if record is first:
            assert datagram.endswith(bytes(16))
            assert macs.take_cookie(unhex(cookie["datagram"]), 100.0)
        else:
            assert not datagram.endswith(bytes(16))


@transcripts
def test_our_response_is_byte_for_byte_that_of_wireguard_go(transcript: dict[str, Any]) -> None:
    ours, theirs, psk = keys(transcript)
    initiation = unhex(transcript["initiation"]["datagram"])
    assert handshake_type(initiation) == 1
    responder = Responder(theirs)
    assert responder.read_static(initiation[INITIATION_NOISE]) == ours.public
    assert responder.read_payload().hex() == transcript["initiation"]["timestamp"]
    record = transcript["response"]
    noise, _, _ = responder.write(unhex(record["ephemeral_private"]), psk)
    packed = pack_response(record["sender"], transcript["initiation"]["sender"], noise)
    assert MacMaker(ours.public).finish(packed, 0.0).hex() == record["datagram"]
    assert responder.transcript.hex() == transcript["handshake_hash"]


@transcripts
def test_both_sides_open_the_transport_data_of_wireguard_go(transcript: dict[str, Any]) -> None:
    ours, theirs, psk = keys(transcript)
    record, response = transcript["initiation"], unhex(transcript["response"]["datagram"])
    initiator = Initiator(ours, theirs.public, psk)
    initiator.write(unhex(record["ephemeral_private"]), unhex(record["timestamp"]))
    payload, send, receive = initiator.read(response[RESPONSE_NOISE])
    assert payload == b""
    assert initiator.transcript.hex() == transcript["handshake_hash"]
    indices = record["sender"], transcript["response"]["sender"]
    for name, (mine, other), (seal, open_) in (
        ("transport_to_initiator", indices, (send, receive)),
        ("transport_to_responder", indices[::-1], (receive, send)),
    ):
        keypair = Keypair(
            local_index=mine,
            remote_index=other,
            created=0.0,
            initiator=True,
            send_key=seal,
            receive_key=open_,
        )
        for message in transcript[name]:
            datagram = unhex(message["datagram"])
            assert int.from_bytes(datagram[4:8], "little") == mine
            opened = open_transport(keypair, datagram)
            assert opened is not None
            assert opened.hex() == message["plaintext"]
            assert open_transport(keypair, datagram) is None
        assert keypair.replay.newest == max(message["counter"] for message in transcript[name])


@transcripts
def test_our_cookie_reply_is_byte_for_byte_that_of_wireguard_go(transcript: dict[str, Any]) -> None:
    _, theirs, _ = keys(transcript)
    record = transcript["cookie"]
    reply, source = unhex(record["datagram"]), unhex(record["source"])
    first, second = (unhex(transcript[n]["datagram"]) for n in ("unanswered_initiation", "initiation"))
    checker = MacChecker(theirs.public, scripted(unhex(record["secret"]), reply[8:32]))
    assert checker.mac1_holds(first)
    assert not checker.mac2_holds(first, source, 5.0)
    assert checker.cookie_reply(first, source, 5.0) == reply
    assert checker.mac1_holds(second)
    assert checker.mac2_holds(second, source, 5.0)
    assert checker.mac2_holds(second, source, 124.9)
    assert not checker.mac2_holds(second, source, 125.0), "the secret lives for 120 s"
    assert not checker.mac2_holds(second, source[:-1] + b"\x5d", 5.0), "another port"


@transcripts
def test_cookie_that_was_not_for_us_is_refused(transcript: dict[str, Any]) -> None:
    _, theirs, _ = keys(transcript)
    reply = unhex(transcript["cookie"]["datagram"])
    macs = MacMaker(theirs.public)
    assert not macs.take_cookie(reply, 0.0), "nothing was sent yet"
    assert macs.finish(b"something else", 0.0).endswith(bytes(16))
    assert not macs.take_cookie(reply, 0.0)
    assert macs.finish(b"something else", 0.0).endswith(bytes(16))


def test_untrusted_bytes_are_classified_without_harm() -> None:
    assert handshake_type(b"") is None
    assert handshake_type(b"\1\0\0") is None
    assert handshake_type(bytes(148)) is None
    for kind, size in ((1, 148), (2, 92), (3, 64)):
        datagram = bytes([kind]) + bytes(size - 1)
        assert handshake_type(datagram) == kind
        assert handshake_type(datagram + b"\0") is None
        assert handshake_type(datagram[:-1]) is None
        assert handshake_type(bytes([kind, 0, 0, 1]) + bytes(size - 4)) is None
