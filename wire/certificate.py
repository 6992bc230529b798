"""Certificates: what the authority of a network says of a node, and the request that a node makes for one."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Annotated, ClassVar, Final

from pydantic import Field, InstanceOf, model_validator

from crossedge.wire.armour import armour, dearmour
from crossedge.wire.codec import U64, Bytes8, Bytes16, Bytes32, Key
from crossedge.wire.endpoint import Network
from crossedge.wire.errors import IdentityError
from crossedge.wire.identity import Label, Name, Signed, key_id, network_id, node_id
from crossedge.wire.limits import MAX_CERTIFICATE
from crossedge.wire.prefixes import (
    overlapping,
    pack_optional_address,
    pack_prefixes,
    unpack_prefixes,
    unpack_v4,
    unpack_v6,
)

ROLES: Final = ("node", "scheduler", "gateway")
"""What a key may do. A role that is not known gives nothing."""

MAX_REQUEST: Final = 512


class Request(Signed):
    """What a node asks the authority to sign: its name and its public keys, signed by its own signing key."""

    DOMAIN: ClassVar[bytes] = b"crossedge/request/v1"
    LIMIT: ClassVar[int] = MAX_REQUEST

    name: Annotated[Name, Key("m")]
    x25519: Annotated[Bytes32, Key("x")]
    ed25519: Annotated[Bytes32, Key("d")]
    issued: Annotated[U64, Key("i")]
    """Unix time in seconds, as far as the node knew it."""

    def to_text(self) -> str:
        """Return the armoured text of a signed request."""
        return armour("REQUEST", self.encode())

    @classmethod
    def from_text(cls, text: bytes) -> Request:
        """Return the request in untrusted armoured text, not verified; raises only `WireError`."""
        return cls.decode(dearmour("REQUEST", text, cls.LIMIT))

    def verify(self) -> None:
        """Check that the node holds the signing key that it names; `IdentityError` otherwise."""
        self.check_signature(self.ed25519)


class Certificate(Signed):
    """Binds a node's name, keys, addresses and rights within one network, for a time."""

    DOMAIN: ClassVar[bytes] = b"crossedge/certificate/v1"
    LIMIT: ClassVar[int] = MAX_CERTIFICATE

    network: Annotated[Bytes16, Key("n")]
    serial: Annotated[U64, Key("s")]
    """Grows with each certificate of a network; the highest per name wins."""
    name: Annotated[Name, Key("m")]
    x25519: Annotated[Bytes32, Key("x")]
    """The static key of WireGuard sessions, and of nothing else."""
    ed25519: Annotated[Bytes32, Key("d")]
    """The key that signs the node's records."""
    overlay4: Annotated[InstanceOf[IPv4Address] | None, Key("o", pack_optional_address, unpack_v4)] = None
    overlay6: Annotated[InstanceOf[IPv6Address] | None, Key("O", pack_optional_address, unpack_v6)] = None
    prefixes4: Annotated[
        tuple[InstanceOf[IPv4Network], ...], Field(max_length=8), Key("p", pack_prefixes, unpack_prefixes)
    ] = ()
    prefixes6: Annotated[
        tuple[InstanceOf[IPv6Network], ...], Field(max_length=8), Key("P", pack_prefixes, unpack_prefixes)
    ] = ()
    groups: Annotated[tuple[Label, ...], Field(max_length=16), Key("g")] = ()
    roles: Annotated[tuple[Label, ...], Field(max_length=8), Key("r")] = ("node",)
    not_before: Annotated[U64, Key("b")]
    """Unix time in seconds."""
    not_after: Annotated[U64, Key("a")]
    """Unix time in seconds; the last one that is covered."""
    issuer: Annotated[Bytes8, Key("k")]
    """Key id of the authority."""

    @model_validator(mode="after")
    def _consistent(self) -> Certificate:
        if self.not_after < self.not_before:
            raise ValueError("ends before it begins")
        if overlapping(self.prefixes) is not None:
            raise ValueError("prefixes overlap")
        return self

    def verify(self, ca_public: bytes) -> None:
        """Check that this authority signed it for its own network; `IdentityError` otherwise."""
        if self.network != network_id(ca_public):
            raise IdentityError("other-network", f"certificate of {self.name}")
        if self.issuer != key_id(ca_public):
            raise IdentityError("other-issuer", f"certificate of {self.name}")
        self.check_signature(ca_public)

    def valid_at(self, unix: float, synchronised: bool = True) -> bool:
        """Tell whether it covers a Unix time; a clock that is not synchronised cannot be too early."""
        return (not synchronised or unix >= self.not_before) and unix < self.not_after + 1

    def supersedes(self, other: Certificate) -> bool:
        """Tell whether it replaces another of the same name."""
        return self.node_id == other.node_id and self.serial > other.serial

    @property
    def node_id(self) -> bytes:
        """The 16-byte id of the node."""
        return node_id(self.network, self.name)

    @property
    def prefixes(self) -> tuple[Network, ...]:
        """The pod prefixes of both families."""
        return (*self.prefixes4, *self.prefixes6)

    @property
    def overlays(self) -> tuple[Network, ...]:
        """The overlay addresses of both families, as prefixes of one address."""
        return tuple(_alone(each) for each in (self.overlay4, self.overlay6) if each is not None)

    @property
    def allowed_ips(self) -> tuple[Network, ...]:
        """All that may come from this node and goes to it."""
        return (*self.overlays, *self.prefixes)


@lru_cache(maxsize=4096)
def _alone(address: IPv4Address | IPv6Address) -> Network:
    """Return the prefix of one address; cached, because allowed IPs are asked for all the time."""
    if isinstance(address, IPv4Address):
        return IPv4Network((address, 32))
    return IPv6Network((address, 128))


def newest(certificates: list[Certificate]) -> dict[bytes, Certificate]:
    """Return the certificate with the highest serial of each node id."""
    best: dict[bytes, Certificate] = {}
    for certificate in certificates:
        held = best.get(certificate.node_id)
        if held is None or certificate.serial > held.serial:
            best[certificate.node_id] = certificate
    return best
