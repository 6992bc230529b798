"""Signed objects for tests, each valid as it stands; what a test wants otherwise it says."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import msgpack

from crossedge.wire.blocklist import Blocklist, Delegation
from crossedge.wire.bundle import Bundle, RendezvousAddress
from crossedge.wire.certificate import Certificate, Request
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.identity import Signed, SigningKey, key_id, network_id
from crossedge.wire.record import (
    Allocation,
    Behaviour,
    Candidate,
    CandidateKind,
    NatVerdict,
    Record,
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


LEAST: dict[str, Any] = {
    "overlay4": None,
    "overlay6": None,
    "prefixes4": (),
    "prefixes6": (),
    "groups": (),
    "roles": ("node",),
}
"""What a certificate need not say."""


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


def packed(kind: type[Signed], key: SigningKey, values: dict[str, object]) -> bytes:
    body: bytes = msgpack.packb(values)
    return body + key.sign(kind.DOMAIN, body)
