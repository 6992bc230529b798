"""Records: what a node says of itself now, signed by its own signing key.

A candidate is one byte of kind and a packed endpoint. A NAT verdict is 6 bytes:

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +---------------+---------------+---------------+---------------+
    |    mapping    |   filtering   |  allocation   |    hairpin    |
    +---------------+---------------+---------------+---------------+
    | lifetime in s, 0: not measured|
    +-------------------------------+
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, ClassVar, NamedTuple, TypeVar

from pydantic import Field, InstanceOf, model_validator

from crossedge.wire.certificate import Certificate
from crossedge.wire.codec import U64, Bytes8, Bytes16, Bytes32, Key
from crossedge.wire.endpoint import UdpEndpoint, pack_endpoint, unpack_endpoint
from crossedge.wire.errors import IdentityError, WireError
from crossedge.wire.identity import Signed
from crossedge.wire.limits import MAX_CANDIDATES, MAX_RECORD
from crossedge.wire.messages import pack_run, unpack_run

MAX_LIFETIME = 7 * 86400
"""Seconds for which a record may be said to hold."""


class CandidateKind(IntEnum):
    """Where a node knows a candidate from. A kind that is not known reads as OTHER."""

    OTHER = 0
    HOST = 1
    REFLEXIVE = 2
    MAPPED = 3
    STATIC = 4


class Behaviour(IntEnum):
    """How a NAT maps or filters (RFC 4787, sections 4.1 and 5); what is not known reads as UNKNOWN."""

    UNKNOWN = 0
    NONE = 1
    """No translation, or nothing filtered."""
    ENDPOINT_INDEPENDENT = 2
    ADDRESS_DEPENDENT = 3
    ADDRESS_AND_PORT_DEPENDENT = 4


class Allocation(IntEnum):
    """How a NAT chooses external ports; a value that is not known reads as UNKNOWN."""

    UNKNOWN = 0
    PRESERVING = 1
    SEQUENTIAL = 2
    RANDOM = 3


@dataclass(frozen=True, slots=True)
class NatVerdict:
    """What a node's network check found of the NAT before it."""

    mapping: Behaviour = Behaviour.UNKNOWN
    filtering: Behaviour = Behaviour.UNKNOWN
    allocation: Allocation = Allocation.UNKNOWN
    hairpin: bool | None = None
    lifetime: int | None = None
    """Seconds that an idle mapping lives, at most 65,535; None if not measured."""


class Candidate(NamedTuple):
    """An endpoint that a node may be tried at."""

    kind: CandidateKind
    endpoint: UdpEndpoint


AnyEnum = TypeVar("AnyEnum", bound=IntEnum)


def _member(kind: type[AnyEnum], value: int) -> AnyEnum:
    try:
        return kind(value)
    except ValueError:
        return kind(0)


def pack_verdict(verdict: NatVerdict) -> bytes:
    """Return the 6 bytes of a verdict."""
    hairpin = 0 if verdict.hairpin is None else 2 if verdict.hairpin else 1
    lifetime = min(verdict.lifetime or 0, 0xFFFF)
    return bytes(
        (verdict.mapping, verdict.filtering, verdict.allocation, hairpin, lifetime >> 8, lifetime & 255)
    )


def unpack_verdict(packed: object) -> NatVerdict:
    """Return the verdict in 6 untrusted bytes; raises only `WireError`."""
    if type(packed) is not bytes or len(packed) != 6:
        raise WireError("malformed", "NAT verdict")
    return NatVerdict(
        _member(Behaviour, packed[0]),
        _member(Behaviour, packed[1]),
        _member(Allocation, packed[2]),
        {1: False, 2: True}.get(packed[3]),
        packed[4] << 8 | packed[5] or None,
    )


def pack_candidates(candidates: Sequence[Candidate]) -> list[bytes]:
    """Return candidates as an array of packed ones."""
    return [bytes([candidate.kind]) + pack_endpoint(candidate.endpoint) for candidate in candidates]


def unpack_candidates(items: object) -> tuple[Candidate, ...]:
    """Return the candidates in an untrusted array; raises only `WireError`."""
    if type(items) is not tuple or len(items) > MAX_CANDIDATES:
        raise WireError("malformed", "candidates")
    if any(type(item) is not bytes or not item for item in items):
        raise WireError("malformed", "candidate")
    return tuple(Candidate(_member(CandidateKind, item[0]), unpack_endpoint(item[1:])) for item in items)


class Record(Signed):
    """Where a node can be tried now, and under which control key it is to be spoken to."""

    DOMAIN: ClassVar[bytes] = b"crossedge/record/v1"
    LIMIT: ClassVar[int] = MAX_RECORD

    node_id: Annotated[Bytes16, Key("n")]
    certificate: Annotated[Bytes16, Key("c")]
    """Fingerprint of the certificate whose signing key signs this."""
    control_key: Annotated[Bytes32, Key("k")]
    seq: Annotated[U64, Key("q")]
    """Grows with each record and each sequenced message of the node; the highest record wins."""
    issued: Annotated[U64, Key("i")]
    """Unix time in seconds."""
    expires: Annotated[U64, Key("e")]
    """Unix time in seconds; the last one that is covered."""
    candidates: Annotated[
        tuple[InstanceOf[Candidate], ...],
        Field(max_length=MAX_CANDIDATES),
        Key("a", pack_candidates, unpack_candidates),
    ] = ()
    """At most 12, the owner's favourite first."""
    verdict: Annotated[InstanceOf[NatVerdict], Key("v", pack_verdict, unpack_verdict)] = NatVerdict()
    servers: Annotated[tuple[Bytes8, ...], Field(max_length=8), Key("s", pack_run, unpack_run(8))] = ()
    """Key ids of the rendezvous that the node registers with."""
    blocklist: Annotated[U64, Key("b")] = 0
    """Serial of the blocklist that the node holds."""

    @model_validator(mode="after")
    def _consistent(self) -> Record:
        if not 0 <= self.expires - self.issued <= MAX_LIFETIME:
            raise ValueError("expires before it is issued, or too late")
        return self

    def verify(self, certificate: Certificate) -> None:
        """Check that the owner of this (verified) certificate signed it; `IdentityError` otherwise."""
        if self.certificate != certificate.fingerprint:
            raise IdentityError("other-certificate", f"record of {certificate.name}")
        if self.node_id != certificate.node_id:
            raise IdentityError("other-node", f"record under the certificate of {certificate.name}")
        self.check_signature(certificate.ed25519)

    def valid_at(self, unix: float) -> bool:
        """Tell whether it still holds at a Unix time; `issued` is not looked at, as clocks differ."""
        return unix < self.expires + 1

    @property
    def endpoints(self) -> tuple[UdpEndpoint, ...]:
        """The endpoints of the candidates, in order."""
        return tuple(candidate.endpoint for candidate in self.candidates)
