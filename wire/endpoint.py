"""Where a datagram comes from or goes to, and which addresses nobody may be aimed at.

A UDP endpoint on the wire, 6 bytes for IPv4 and 18 for IPv6:

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +---------------------------------------------------------------+
    |                  address (4 or 16 bytes)  ...                 |
    +-------------------------------+-------------------------------+
    |       port, big-endian        |
    +-------------------------------+
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import NamedTuple, TypeAlias

from crossedge.wire.errors import WireError

Network: TypeAlias = IPv4Network | IPv6Network

V4_ENDPOINT_SIZE = 6
V6_ENDPOINT_SIZE = 18
V4_MAPPED_PREFIX = bytes(10) + b"\xff\xff"


class UdpEndpoint(NamedTuple):
    """An address in canonical text (as `inet_ntop` writes it) and a port; equals the kernel's IPv4 tuple."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class RelayEndpoint(NamedTuple):
    """A relay channel (48-bit id) at a rendezvous."""

    server: UdpEndpoint
    channel: int

    def __str__(self) -> str:
        return f"relay {self.channel:012x} at {self.server}"


class SocketEndpoint(NamedTuple):
    """A UDP endpoint as a further socket of ours reaches it: from another port, by another NAT mapping."""

    remote: UdpEndpoint
    local: int
    """Number of the socket; the daemon's own has none."""

    def __str__(self) -> str:
        return f"{self.remote} from socket {self.local}"


DirectEndpoint: TypeAlias = UdpEndpoint | SocketEndpoint
Endpoint: TypeAlias = UdpEndpoint | SocketEndpoint | RelayEndpoint


def remote_of(endpoint: DirectEndpoint) -> UdpEndpoint:
    """Return the UDP endpoint that this is, from whichever socket of ours."""
    return endpoint.remote if isinstance(endpoint, SocketEndpoint) else endpoint


def pack_address(host: str) -> bytes:
    """Return the 4 or 16 bytes of an address in text; `ValueError` if it is none."""
    try:
        return inet_pton(AF_INET6 if ":" in host else AF_INET, host)
    except OSError:
        raise ValueError(f"not an IP address: {host!r}") from None


def unpack_address(packed: bytes) -> str:
    """Return the canonical text of 4 or 16 untrusted bytes; raises only `WireError`."""
    if type(packed) is not bytes or len(packed) not in (4, 16):
        raise WireError("bad-address", "an address has 4 or 16 bytes")
    if len(packed) == 4:
        return inet_ntop(AF_INET, packed)
    if packed.startswith(V4_MAPPED_PREFIX):
        raise WireError("bad-address", "an IPv4 address is written in 4 bytes")
    return inet_ntop(AF_INET6, packed)


def pack_endpoint(endpoint: UdpEndpoint) -> bytes:
    """Return the 6 or 18 bytes of an endpoint; `ValueError` if it is none."""
    if not 0 < endpoint.port < 65536:
        raise ValueError(f"not a UDP port: {endpoint.port!r}")
    return pack_address(endpoint.host) + endpoint.port.to_bytes(2, "big")


def unpack_endpoint(packed: bytes) -> UdpEndpoint:
    """Return the endpoint in 6 or 18 untrusted bytes; raises only `WireError`."""
    if type(packed) is not bytes or len(packed) not in (V4_ENDPOINT_SIZE, V6_ENDPOINT_SIZE):
        raise WireError("bad-endpoint", "an endpoint has 6 or 18 bytes")
    port = packed[-2] << 8 | packed[-1]
    if not port:
        raise WireError("bad-endpoint", "port 0")
    return UdpEndpoint(unpack_address(packed[:-2]), port)


def parse_endpoint(text: str) -> UdpEndpoint:
    """Return the endpoint written `a.b.c.d:port` or `[v6]:port` in canonical form, else `ValueError`."""
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if (
        not separator
        or bracketed != (":" in host)
        or not (port.isascii() and port.isdigit() and len(port) < 6)
    ):
        raise ValueError(f"not address:port or [address]:port: {text!r}")
    packed = pack_address(host[1:-1] if bracketed else host)
    endpoint = UdpEndpoint(inet_ntop(AF_INET6 if bracketed else AF_INET, packed), int(port))
    pack_endpoint(endpoint)
    return endpoint


def refused_candidate(host: str, mesh_prefixes: Iterable[Network] = ()) -> str | None:
    """Return why nothing may be sent to this address on somebody's word, or None where it may be tried.

    `mesh_prefixes` are the network's own prefixes: a candidate inside them would be a tunnel in the tunnel.
    """
    try:
        address = ip_address(host)
    except ValueError:
        return "not-an-address"
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return "v4-mapped"
        if address.scope_id is not None:
            return "link-local"
    for name, refused in (
        ("unspecified", address.is_unspecified),
        ("loopback", address.is_loopback),
        ("multicast", address.is_multicast),
        ("link-local", address.is_link_local),
        ("reserved", address.is_reserved or (address.version == 4 and address.packed[0] == 0)),
    ):
        if refused:
            return name
    if any(address.version == prefix.version and address in prefix for prefix in mesh_prefixes):
        return "mesh-prefix"
    return None
