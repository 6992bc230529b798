"""Signed objects of every kind: their bytes, their domains, their ids; any change of them is noticed."""

from __future__ import annotations

from hashlib import blake2s
from pathlib import Path

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from crossedge.wire.blocklist import Blocklist, Delegation
from crossedge.wire.bundle import Bundle
from crossedge.wire.certificate import Certificate, Request
from crossedge.wire.errors import IdentityError, WireError
from crossedge.wire.identity import Signed, key_id, node_id
from crossedge.wire.record import (
    NatVerdict,
    Record,
)
from tests.identities import (
    CA,
    LEAST,
    NETWORK,
    NODE,
    STRANGER,
    blocklist,
    bundle,
    certificate,
    delegation,
    record,
    request,
)

EXAMPLES: dict[str, Signed] = {
    "request": request(),
    "certificate": certificate(),
    "certificate-least": certificate(**LEAST),
    "record": record(),
    "record-least": record(candidates=(), verdict=NatVerdict(), servers=(), blocklist=0),
    "blocklist": blocklist(),
    "delegation": delegation(),
    "blocklist-delegated": blocklist(STRANGER, delegation=delegation().encode()),
    "bundle": bundle(),
}


@pytest.fixture(scope="module")
def golden(repository: Path) -> dict[str, bytes]:
    lines = (repository / "tests" / "wire_identity.hex").read_text().splitlines()
    pairs = (line.split() for line in lines if line and not line.startswith("#"))
    return {name: bytes.fromhex(value) for name, value in pairs}


@pytest.mark.parametrize("name", EXAMPLES)
def test_bytes_on_the_wire_do_not_change(name: str, golden: dict[str, bytes]) -> None:
    signed = EXAMPLES[name]
    assert signed.encode().hex() == golden[name].hex()
    assert type(signed).decode(golden[name]) == signed


@pytest.mark.parametrize("name", EXAMPLES)
def test_signature_covers_the_domain_and_the_body(name: str) -> None:
    signed = EXAMPLES[name]
    key = {"request": NODE, "record": NODE, "record-least": NODE, "blocklist-delegated": STRANGER}.get(
        name, CA
    )
    body, signature = signed.encode()[:-64], signed.encode()[-64:]
    Ed25519PublicKey.from_public_bytes(key.public).verify(signature, type(signed).DOMAIN + body)
    msgpack.unpackb(body)


def test_domains_are_apart() -> None:
    domains = {kind.DOMAIN for kind in (Request, Certificate, Record, Delegation, Blocklist, Bundle)}
    assert len(domains) == 6
    assert all(domain.startswith(b"crossedge/") and domain.endswith(b"/v1") for domain in domains)


def test_ids_are_what_the_text_says() -> None:
    assert blake2s(CA.public, digest_size=16).digest() == NETWORK
    expected = blake2s(b"edge-7.berlin", digest_size=16, key=NETWORK, person=b"node").digest()
    assert node_id(NETWORK, "edge-7.berlin") == expected == certificate().node_id
    assert key_id(CA.public) == blake2s(CA.public, digest_size=8, person=b"keyid").digest()
    encoded = certificate().encode()
    assert certificate().fingerprint == blake2s(encoded, digest_size=16, person=b"print").digest()


@pytest.mark.parametrize("name", EXAMPLES)
def test_any_changed_byte_is_noticed(name: str) -> None:
    signed = EXAMPLES[name]
    key = {"request": NODE, "record": NODE, "record-least": NODE, "blocklist-delegated": STRANGER}.get(
        name, CA
    )
    encoded = signed.encode()
    for at in range(0, len(encoded), 5):
        changed = bytearray(encoded)
        changed[at] ^= 4
        with pytest.raises(WireError):
            type(signed).decode(bytes(changed)).check_signature(key.public)


def test_one_kind_does_not_pass_for_another() -> None:
    body = certificate().encode()[:-64]
    wrong = body + CA.sign(Blocklist.DOMAIN, body)
    with pytest.raises(IdentityError, match="bad-signature"):
        Certificate.decode(wrong).verify(CA.public)


def test_unsigned_object_has_no_bytes() -> None:
    unsigned = Delegation(network=NETWORK, key=NODE.public, not_before=1, not_after=2, last_serial=3)
    with pytest.raises(ValueError, match="not signed"):
        unsigned.encode()
