"""Certificates, records, blocklists and bundles: their bytes, their sizes, and whom they let through."""

from __future__ import annotations

from base64 import b64encode
from hashlib import blake2s
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from crossedge.wire.blocklist import Blocklist, Delegation
from crossedge.wire.bundle import Bundle, RendezvousAddress
from crossedge.wire.certificate import Certificate, Request, newest
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ENVELOPE_OVERHEAD, ControlKey, PairKeys, seal
from crossedge.wire.errors import IdentityError, WireError
from crossedge.wire.identity import Signed, SigningKey, is_name, key_id, network_id, node_id
from crossedge.wire.limits import MAX_CERTIFICATE, MAX_CONTROL, MAX_PLAINTEXT, MAX_RECORD
from crossedge.wire.messages import CallBody, Called, Register, encode
from crossedge.wire.record import (
    Allocation,
    Behaviour,
    Candidate,
    CandidateKind,
    NatVerdict,
    Record,
    pack_verdict,
    unpack_verdict,
)

CA, OTHER_CA = SigningKey(b"\x01" * 32), SigningKey(b"\x02" * 32)
NODE, STRANGER = SigningKey(b"\x03" * 32), SigningKey(b"\x04" * 32)
NETWORK = network_id(CA.public)
NOW = 1_700_000_000


def certificate(ca: SigningKey = CA, **changes: Any) -> Certificate:
    fields: dict[str, Any] = {
        "network": NETWORK,
        "serial": 17,
        "name": "edge-7.berlin",
        "x25519": b"\x05" * 32,
        "ed25519": NODE.public,
        "overlay4": IPv4Address("10.159.0.7"),
        "overlay6": IPv6Address("fd12:3456:789a::7"),
        "prefixes4": (IPv4Network("10.160.7.0/24"),),
        "prefixes6": (IPv6Network("fd12:3456:789a:7::/64"),),
        "groups": ("shops", "cameras"),
        "roles": ("node", "gateway"),
        "not_before": NOW,
        "not_after": NOW + 365 * 86400,
        "issuer": key_id(CA.public),
    }
    return Certificate(**{**fields, **changes}).sign(ca)


def candidates(v4: int, v6: int) -> tuple[Candidate, ...]:
    return (
        *(Candidate(CandidateKind.HOST, UdpEndpoint(f"192.168.178.{n}", 41820)) for n in range(v4)),
        *(Candidate(CandidateKind.HOST, UdpEndpoint(f"2001:db8:1:2:3:4:5:{n:x}", 41820)) for n in range(v6)),
    )


def record(key: SigningKey = NODE, of: Certificate | None = None, **changes: Any) -> Record:
    of = of or certificate()
    fields: dict[str, Any] = {
        "node_id": of.node_id,
        "certificate": of.fingerprint,
        "control_key": b"\x06" * 32,
        "seq": NOW * 1_000_000,
        "issued": NOW,
        "expires": NOW + 3600,
        "candidates": (
            Candidate(CandidateKind.REFLEXIVE, UdpEndpoint("198.51.100.7", 41820)),
            Candidate(CandidateKind.HOST, UdpEndpoint("2001:db8::7", 41820)),
        ),
        "verdict": NatVerdict(
            Behaviour.ENDPOINT_INDEPENDENT,
            Behaviour.ADDRESS_AND_PORT_DEPENDENT,
            Allocation.PRESERVING,
            False,
            120,
        ),
        "servers": (b"server 1", b"server 2"),
        "blocklist": 3,
    }
    return Record(**{**fields, **changes}).sign(key)


def blocklist(key: SigningKey = CA, **changes: Any) -> Blocklist:
    fields: dict[str, Any] = {
        "network": NETWORK,
        "serial": 3,
        "issued": NOW,
        "revoked": {"edge-7.berlin": 18},
    }
    return Blocklist(**{**fields, **changes}).sign(key)


def delegation(ca: SigningKey = CA, **changes: Any) -> Delegation:
    fields: dict[str, Any] = {
        "network": NETWORK,
        "key": STRANGER.public,
        "not_before": NOW,
        "not_after": NOW + 86400,
        "last_serial": 100,
    }
    return Delegation(**{**fields, **changes}).sign(ca)


RENDEZVOUS = RendezvousAddress("rendezvous.example.com", 3478, b"\x07" * 32)


def bundle(key: SigningKey = CA, **changes: Any) -> Bundle:
    fields: dict[str, Any] = {
        "certificate": certificate(),
        "ca": CA.public,
        "blocklist": blocklist(),
        "rendezvous": (RENDEZVOUS,),
        "supernets": (IPv4Network("10.160.0.0/12"), IPv6Network("fd12:3456:789a::/48")),
        "issued": NOW,
    }
    return Bundle(**{**fields, **changes}).sign(key)


def request() -> Request:
    return Request(name="edge-7.berlin", x25519=b"\x05" * 32, ed25519=NODE.public, issued=NOW).sign(NODE)


EXAMPLES: dict[str, Signed] = {
    "request": request(),
    "certificate": certificate(),
    "certificate-least": certificate(
        overlay4=None, overlay6=None, prefixes4=(), prefixes6=(), groups=(), roles=("node",)
    ),
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


# Sizes


def realistic() -> Certificate:
    return certificate(
        serial=2**40,
        name="edge-node-17.factory-berlin.edge.example.com",
        prefixes4=(IPv4Network("10.160.7.0/24"), IPv4Network("10.161.0.0/24")),
        prefixes6=(IPv6Network("fd12:3456:789a:7::/64"),),
        groups=("factories", "berlin", "cameras", "staging"),
        roles=("node", "gateway", "scheduler"),
    )


def test_realistic_certificate_is_under_500_bytes() -> None:
    assert len(realistic().encode()) < 500
    assert MAX_CERTIFICATE < 500


def test_certificate_of_500_bytes_is_refused_here_and_there() -> None:
    with pytest.raises(ValueError, match="499 are allowed"):
        certificate(groups=tuple(f"a-rather-long-group-name-{n}" for n in range(16)))
    with pytest.raises(WireError, match="too-long"):
        Certificate.decode(bytes(500))


def test_record_with_12_candidates_and_its_certificate_fit_one_control_message() -> None:
    for v4, v6 in ((6, 6), (0, 12)):
        full = record(
            of=realistic(),
            candidates=candidates(v4, v6),
            seq=2**64 - 1,
            servers=(bytes(8),) * 8,
            blocklist=2**64 - 1,
        )
        message = Register(
            id=2**32 - 1, seq=2**64 - 1, record=full.encode(), certificate=realistic().encode()
        )
        assert len(full.encode()) <= MAX_RECORD
        assert len(encode(message)) + ENVELOPE_OVERHEAD <= MAX_CONTROL


def test_called_fits_with_its_sealed_inner_message_and_mostly_with_the_record_too() -> None:
    endpoints = tuple(candidate.endpoint for candidate in candidates(6, 6))
    pair = PairKeys.derive(ControlKey(b"\x01" * 32), ControlKey(b"\x02" * 32).public)
    full = CallBody(
        seq=2**64 - 1,
        attempt=255,
        candidates=endpoints,
        observed_by=((bytes(8), endpoints[-1]),) * 4,
        rtt=0.1,
        initiation=bytes(148),
    )
    usual = CallBody(seq=2**64 - 1, candidates=endpoints, rtt=0.1)
    for body, carried in ((full, b""), (usual, record(candidates=candidates(6, 6)).encode())):
        called = Called(
            caller=bytes(16),
            caller_seq=2**64 - 1,
            channel=2**48 - 1,
            observed=endpoints[-1],
            sealed=seal(encode(body), pair, bytes(24)),
            record=carried,
        )
        assert len(encode(called)) <= MAX_PLAINTEXT


# Certificates


def test_certificate_is_believed_only_from_its_own_authority() -> None:
    certificate().verify(CA.public)
    with pytest.raises(IdentityError, match="other-network"):
        certificate().verify(OTHER_CA.public)
    with pytest.raises(IdentityError, match="bad-signature"):
        certificate(OTHER_CA).verify(CA.public)
    with pytest.raises(IdentityError, match="other-issuer"):
        certificate(issuer=key_id(OTHER_CA.public)).verify(CA.public)


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


def test_field_of_a_later_version_survives_being_handed_on() -> None:
    values = msgpack.unpackb(certificate().encode()[:-64])
    body = msgpack.packb({**values, "later": 1})
    encoded = body + CA.sign(Certificate.DOMAIN, body)
    decoded = Certificate.decode(encoded)
    decoded.verify(CA.public)
    assert decoded.encode() == encoded


def test_one_kind_does_not_pass_for_another() -> None:
    body = certificate().encode()[:-64]
    wrong = body + CA.sign(Blocklist.DOMAIN, body)
    with pytest.raises(IdentityError, match="bad-signature"):
        Certificate.decode(wrong).verify(CA.public)


def test_validity_is_read_to_the_second_and_not_before_needs_a_clock() -> None:
    held = certificate(not_before=100, not_after=200)
    assert [held.valid_at(unix) for unix in (99, 100, 200.9, 201)] == [False, True, True, False]
    assert held.valid_at(5, synchronised=False)
    assert not held.valid_at(201, synchronised=False)


def test_highest_serial_of_a_name_wins() -> None:
    old, new, other = certificate(serial=1), certificate(serial=2), certificate(serial=1, name="edge-8")
    assert newest([new, old, other]) == {new.node_id: new, other.node_id: other}
    assert new.supersedes(old)
    assert not old.supersedes(new)
    assert not new.supersedes(other)


def test_allowed_ips_are_overlay_addresses_and_prefixes() -> None:
    assert [str(network) for network in certificate().allowed_ips] == [
        "10.159.0.7/32",
        "fd12:3456:789a::7/128",
        "10.160.7.0/24",
        "fd12:3456:789a:7::/64",
    ]


def packed(kind: type[Signed], key: SigningKey, values: dict[str, object]) -> bytes:
    body: bytes = msgpack.packb(values)
    return body + key.sign(kind.DOMAIN, body)


@pytest.mark.parametrize(
    "changes",
    [
        {"m": "Edge"},
        {"m": ""},
        {"m": "a" * 64},
        {"m": "edge\n"},
        {"m": "edge-"},
        {"m": "éclair"},
        {"x": bytes(31)},
        {"n": bytes(15)},
        {"s": -1},
        {"p": [b"\x0a\xa0\x07\x01\x18"]},  # host bits
        {"p": [b"\x0a\xa0\x07\x00\x21"]},  # /33
        {"p": [bytes(17)]},
        {"p": [b"\x0a\xa0\x00\x00\x10", b"\x0a\xa0\x07\x00\x18"]},  # overlap
        {"p": [bytes(5)] * 17},
        {"p": b"\x0a\xa0\x07\x00\x18"},
        {"P": [bytes(16) + b"\x81"]},
        {"o": bytes(3)},
        {"O": bytes(4)},
        {"g": ["a"] * 17},
        {"g": ["Shops"]},
        {"g": [7]},
        {"a": 1, "b": 2},
        {"a": 1.5},
    ],
)
def test_certificate_with_a_wrong_field_is_a_wire_error(changes: dict[str, object]) -> None:
    values = msgpack.unpackb(certificate().encode()[:-64])
    with pytest.raises(WireError):
        Certificate.decode(packed(Certificate, CA, {**values, **changes}))


def test_names() -> None:
    assert all(map(is_name, ("a", "7", "edge-1", "a.b-c", "a" * 63)))
    assert not any(map(is_name, ("", "-a", "a-", "A", "a_b", "a" * 64, "a b", "a\n", "ä", "٣")))


def test_request_proves_the_signing_key() -> None:
    request().verify()
    assert Request.from_text(request().to_text().encode()) == request()
    forged = Request(name="edge-7.berlin", x25519=bytes(32), ed25519=NODE.public, issued=NOW).sign(STRANGER)
    with pytest.raises(IdentityError, match="bad-signature"):
        forged.verify()


# Records


def test_record_is_believed_only_with_its_own_certificate() -> None:
    record().verify(certificate())
    with pytest.raises(IdentityError, match="other-certificate"):
        record().verify(certificate(serial=18))
    with pytest.raises(IdentityError, match="bad-signature"):
        record(STRANGER).verify(certificate())
    with pytest.raises(IdentityError, match="other-node"):
        record(node_id=bytes(16)).verify(certificate())


def test_record_holds_until_it_expires() -> None:
    assert record().valid_at(NOW + 3600.9)
    assert not record().valid_at(NOW + 3601)
    assert record().valid_at(0)


@pytest.mark.parametrize(("issued", "expires"), [(5, 4), (0, 8 * 86400)])
def test_record_has_a_sensible_lifetime(issued: int, expires: int) -> None:
    with pytest.raises(ValidationError):
        record(issued=issued, expires=expires)


def test_kinds_and_behaviours_of_a_later_version_read_as_unknown() -> None:
    assert unpack_verdict(b"\xff\x63\x2a\x09\x00\x00") == NatVerdict()
    values = msgpack.unpackb(record().encode()[:-64])
    values["a"] = [b"\x63" + bytes.fromhex("c6336407a35c")]
    read = Record.decode(packed(Record, NODE, values))
    assert read.candidates == (Candidate(CandidateKind.OTHER, UdpEndpoint("198.51.100.7", 41820)),)
    assert read.endpoints == (UdpEndpoint("198.51.100.7", 41820),)


@pytest.mark.parametrize("hairpin", [None, False, True])
@pytest.mark.parametrize("lifetime", [None, 1, 300, 65535])
def test_verdict_round_trips(hairpin: bool | None, lifetime: int | None) -> None:
    verdict = NatVerdict(
        Behaviour.ADDRESS_DEPENDENT, Behaviour.NONE, Allocation.SEQUENTIAL, hairpin, lifetime
    )
    assert unpack_verdict(pack_verdict(verdict)) == verdict


@pytest.mark.parametrize(
    "changes",
    [
        {"a": [b"\1" + bytes.fromhex("c6336407a35c")] * 13},
        {"a": [b""]},
        {"a": [b"\1"]},
        {"a": ["text"]},
        {"a": 5},
        {"v": bytes(5)},
        {"v": [1, 2, 3]},
        {"s": bytes(9)},
        {"s": bytes(72)},
        {"k": bytes(31)},
        {"e": 1},
    ],
)
def test_record_with_a_wrong_field_is_a_wire_error(changes: dict[str, object]) -> None:
    values = msgpack.unpackb(record().encode()[:-64])
    with pytest.raises(WireError):
        Record.decode(packed(Record, NODE, {**values, **changes}))


# Blocklists


def test_blocklist_revokes_what_is_below_the_serial() -> None:
    listed = blocklist()
    assert listed.revokes(certificate(serial=17))
    assert not listed.revokes(certificate(serial=18))
    assert not listed.revokes(certificate(name="edge-8"))


def test_blocklist_is_believed_from_the_authority_and_from_whom_it_lets_revoke() -> None:
    blocklist().verify(CA.public)
    blocklist(STRANGER, delegation=delegation().encode()).verify(CA.public)
    refused = {
        "other-network": (blocklist(network=bytes(16)), CA),
        "bad-signature": (blocklist(STRANGER), CA),
    }
    for reason, (listed, ca) in refused.items():
        with pytest.raises(IdentityError, match=reason):
            listed.verify(ca.public)


@pytest.mark.parametrize(
    ("reason", "word", "changes"),
    [
        ("bad-signature", delegation(STRANGER), {}),
        ("bad-signature", delegation(key=NODE.public), {}),
        ("other-network", delegation(network=bytes(16)), {}),
        ("delegation-exceeded", delegation(), {"serial": 101}),
        ("delegation-expired", delegation(), {"issued": NOW - 1}),
        ("delegation-expired", delegation(), {"issued": NOW + 86401}),
    ],
)
def test_delegation_that_does_not_hold(reason: str, word: Delegation, changes: dict[str, object]) -> None:
    with pytest.raises(IdentityError, match=reason):
        blocklist(STRANGER, delegation=word.encode(), **changes).verify(CA.public)


def test_delegation_that_is_garbage_is_a_wire_error() -> None:
    with pytest.raises(WireError):
        blocklist(STRANGER, delegation=bytes(100)).verify(CA.public)


def test_blocklist_never_goes_back() -> None:
    held = blocklist(serial=5)
    blocklist(serial=6).check_replaces(held)
    held.check_replaces(None)
    for serial in (4, 5):
        with pytest.raises(IdentityError, match="blocklist-stale"):
            blocklist(serial=serial).check_replaces(held)


def test_only_the_authority_takes_a_revocation_back() -> None:
    held = blocklist(serial=5)
    blocklist(serial=6, revoked={}).check_replaces(held)
    delegated = delegation().encode()
    more = {"edge-7.berlin": 18, "edge-8": 4}
    blocklist(STRANGER, serial=6, revoked=more, delegation=delegated).check_replaces(held)
    for less in ({}, {"edge-7.berlin": 17}, {"edge-8": 99}):
        with pytest.raises(IdentityError, match="blocklist-unrevokes"):
            blocklist(STRANGER, serial=6, revoked=less, delegation=delegated).check_replaces(held)


def test_blocklist_is_bounded() -> None:
    with pytest.raises(ValidationError):
        blocklist(revoked={f"n{n}": 1 for n in range(4097)})
    largest = blocklist(revoked={f"n{n:062}": 2**64 - 1 for n in range(3500)})
    assert Blocklist.decode(largest.encode()) == largest
    with pytest.raises(WireError, match="malformed"):
        Blocklist.decode(packed(Blocklist, CA, {"n": NETWORK, "s": 1, "i": 1, "r": {"Bad Name": 1}}))


# Bundles and addresses


def test_bundle_is_all_that_a_node_needs() -> None:
    read = Bundle.from_text(bundle().to_text().encode())
    read.verify()
    read.verify(CA.public)
    assert read == bundle()
    assert read.network == NETWORK
    assert read.certificate.name == "edge-7.berlin"
    assert read.rendezvous == (RENDEZVOUS,)


def test_bundle_is_believed_only_whole() -> None:
    with pytest.raises(IdentityError, match="other-network"):
        bundle().verify(OTHER_CA.public)
    with pytest.raises(IdentityError, match="bad-signature"):
        bundle(OTHER_CA).verify()
    with pytest.raises(IdentityError, match="bad-signature"):
        bundle(certificate=certificate(OTHER_CA)).verify()
    with pytest.raises(IdentityError, match="bad-signature"):
        bundle(blocklist=blocklist(OTHER_CA)).verify()


@pytest.mark.parametrize(
    "changes", [{"c": 5}, {"c": b"x"}, {"b": []}, {"v": ["x"]}, {"v": [5]}, {"n": [b""]}]
)
def test_bundle_with_a_wrong_field_is_a_wire_error(changes: dict[str, object]) -> None:
    values = msgpack.unpackb(bundle().encode()[:-64])
    with pytest.raises(WireError):
        Bundle.decode(packed(Bundle, CA, {**values, **changes}))


KEY64 = b64encode(bytes(range(32))).decode()


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        (f"198.51.100.7:3478#{KEY64}", "198.51.100.7", 3478),
        (f"[2001:db8::7]:1#{KEY64}", "2001:db8::7", 1),
        (f"rendezvous.example.com:65535#{KEY64}", "rendezvous.example.com", 65535),
    ],
)
def test_rendezvous_address_round_trips(text: str, host: str, port: int) -> None:
    address = RendezvousAddress.parse(text)
    assert (address.host, address.port, address.public_key) == (host, port, bytes(range(32)))
    assert str(address) == text
    assert address.key_id == key_id(bytes(range(32)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:3478",
        f"host#{KEY64}",
        f":3478#{KEY64}",
        f"host:0#{KEY64}",
        f"host:70000#{KEY64}",
        f"host:٣#{KEY64}",
        f"2001:db8::7:3478#{KEY64}",
        f"[host]:3478#{KEY64}",
        f"[2001:db8::7:3478#{KEY64}",
        f"1.2.3:3478#{KEY64}",
        f"ho st:3478#{KEY64}",
        f"{'a' * 254}:3478#{KEY64}",
        "host:3478#AAAA",
        f"host:3478#{KEY64}#",
        f"host:3478#{KEY64[:-1]}",
        "host:3478#\ud800",
    ],
)
def test_rendezvous_address_says_what_was_expected(text: str) -> None:
    with pytest.raises(WireError) as raised:
        RendezvousAddress.parse(text)
    assert raised.value.reason == "bad-rendezvous"
    assert "host:port" in raised.value.detail


def test_unsigned_object_has_no_bytes() -> None:
    unsigned = Delegation(network=NETWORK, key=NODE.public, not_before=1, not_after=2, last_serial=3)
    with pytest.raises(ValueError, match="not signed"):
        unsigned.encode()
