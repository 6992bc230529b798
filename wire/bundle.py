"""The signed bundle: all that a node needs to join, and the address that names a rendezvous."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import Field, InstanceOf

from crossedge.wire.armour import armour, dearmour
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.certificate import Certificate
from crossedge.wire.codec import U64, Bytes32, Key
from crossedge.wire.endpoint import pack_address
from crossedge.wire.errors import IdentityError, WireError
from crossedge.wire.identity import Signed, key_id, network_id
from crossedge.wire.limits import MAX_BLOCKLIST
from crossedge.wire.prefixes import pack_prefixes, unpack_prefixes

LABEL: Final = "BUNDLE"
_HOST: Final = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?\.?")


@dataclass(frozen=True, slots=True)
class RendezvousAddress:
    """A rendezvous: a host name or address, its UDP port, its control (X25519) public key."""

    host: str
    port: int
    public_key: bytes

    @classmethod
    def parse(cls, text: str) -> RendezvousAddress:
        """Return the address written as `host:port#base64 key`, an IPv6 host in brackets.

        Raises only `WireError`, whose detail says what was expected.
        """
        where, _, key = text.partition("#")
        host, _, port = where.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            valid = ":" in host
        else:
            valid = ":" not in host and _HOST.fullmatch(host) is not None
        if valid and (":" in host or host.replace(".", "").isdigit()):
            try:
                pack_address(host)
            except ValueError:
                valid = False
        if not (valid and port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536):
            raise WireError("bad-rendezvous", "host:port#key, with [ ] around an IPv6 address")
        try:
            public = b64decode(key.encode(), validate=True)
        except ValueError:
            public = b""
        if len(public) != 32:
            raise WireError("bad-rendezvous", "32 bytes of base64 after host:port#")
        return cls(host, int(port), public)

    @property
    def key_id(self) -> bytes:
        """The 8-byte id under which records name this rendezvous."""
        return key_id(self.public_key)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}#{b64encode(self.public_key).decode()}"


def _pack_rendezvous(addresses: Sequence[RendezvousAddress]) -> list[str]:
    return [str(address) for address in addresses]


def _unpack_rendezvous(items: object) -> tuple[RendezvousAddress, ...]:
    if type(items) is not tuple or any(type(item) is not str for item in items):
        raise WireError("bad-rendezvous", "an array of text")
    return tuple(RendezvousAddress.parse(item) for item in items)


def _unpack_with(decode: Callable[[bytes], Signed]) -> Callable[[Any], Signed]:
    def unpack(packed: Any) -> Signed:
        if type(packed) is not bytes:
            raise WireError("malformed", "bytes are needed")
        return decode(packed)

    return unpack


class Bundle(Signed):
    """What `crossedge ca sign` gives back for a request, signed as a whole by the authority."""

    DOMAIN: ClassVar[bytes] = b"crossedge/bundle/v1"
    LIMIT: ClassVar[int] = MAX_BLOCKLIST + 8192

    certificate: Annotated[
        InstanceOf[Certificate], Key("c", Certificate.encode, _unpack_with(Certificate.decode))
    ]
    ca: Annotated[Bytes32, Key("k")]
    """The authority's Ed25519 public key: from here on the node's only root of trust."""
    blocklist: Annotated[InstanceOf[Blocklist], Key("b", Blocklist.encode, _unpack_with(Blocklist.decode))]
    rendezvous: Annotated[
        tuple[InstanceOf[RendezvousAddress], ...],
        Field(max_length=8),
        Key("v", _pack_rendezvous, _unpack_rendezvous),
    ] = ()
    supernets: Annotated[
        tuple[InstanceOf[IPv4Network] | InstanceOf[IPv6Network], ...],
        Field(max_length=16),
        Key("n", pack_prefixes, unpack_prefixes),
    ] = ()
    """What every prefix and overlay address of the network is taken from."""
    issued: Annotated[U64, Key("i")]
    """Unix time in seconds."""

    @property
    def network(self) -> bytes:
        """The 16-byte id of the network."""
        return network_id(self.ca)

    def verify(self, ca_public: bytes | None = None) -> None:
        """Check that one authority signed all of it; `IdentityError` otherwise.

        `ca_public` is the authority that is expected, None for whichever it names.
        """
        if ca_public is not None and ca_public != self.ca:
            raise IdentityError("other-network", "bundle")
        self.check_signature(self.ca)
        self.certificate.verify(self.ca)
        self.blocklist.verify(self.ca)

    def to_text(self) -> str:
        """Return the armoured text of a signed bundle."""
        return armour(LABEL, self.encode())

    @classmethod
    def from_text(cls, text: bytes) -> Self:
        """Return the bundle in untrusted armoured text, not verified; raises only `WireError`."""
        return cls.decode(dearmour(LABEL, text, cls.LIMIT))
