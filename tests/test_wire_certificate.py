"""Certificates and requests: their sizes, their authority, what stands in them."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

import msgpack
import pytest

from crossedge.wire.certificate import Certificate, Request, newest
from crossedge.wire.envelope import ENVELOPE_OVERHEAD, ControlKey, PairKeys, seal
from crossedge.wire.errors import IdentityError, WireError
from crossedge.wire.identity import is_name, key_id
from crossedge.wire.limits import MAX_CERTIFICATE, MAX_CONTROL, MAX_PLAINTEXT, MAX_RECORD
from crossedge.wire.messages import CallBody, Called, Register, encode
from tests.identities import (
    CA,
    NODE,
    NOW,
    OTHER_CA,
    STRANGER,
    candidates,
    certificate,
    packed,
    record,
    request,
)

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


def test_field_of_a_later_version_survives_being_handed_on() -> None:
    values = msgpack.unpackb(certificate().encode()[:-64])
    body = msgpack.packb({**values, "later": 1})
    encoded = body + CA.sign(Certificate.DOMAIN, body)
    decoded = Certificate.decode(encoded)
    decoded.verify(CA.public)
    assert decoded.encode() == encoded


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
