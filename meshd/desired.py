"""What this host should look like: a value, made from certificates and configuration alone.

Routing, in table 41820 of both families, which every packet without our own mark looks up first:

    a peer's prefix        via the TUN, source our overlay address; `mtu` where a stock peer's path is narrow
    a mesh supernet        via the TUN, so that a first packet to a node not yet known reaches the daemon
    a mesh supernet        unreachable, at a worse metric: with the TUN gone nothing leaves in the clear
    our own pod prefix     throw: our pods' routes are in the main table

and in the main table our own pod prefix as unreachable, below the routes of single pods, so that a packet to
a pod that is gone does not follow the default route.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from crossedge.host.netlink import Address, Network
from crossedge.host.routes import RT_TABLE_MAIN, THROW, UNREACHABLE, Route
from crossedge.host.rules import Rule
from crossedge.host.tun import MTU

TABLE = 41820
"""Our routing table."""
PROTOCOL = 206
"""Our rtproto: by it routes and rules of ours are known, in this life and the next."""
PRIORITY = 5206
"""Priority of our rule, between the local table (0) and the main one (32766)."""
MARK = 0xCE5E
"""Mark of our own datagrams, which pass our table by."""
METRIC_PEER = 1024
METRIC_MESH = 2048
METRIC_NOWHERE = 0x7FFFFFFF

PORT = 41820
"""Default UDP port of the daemon."""
ANYONE = "any"
"""As a group: every member."""


class PeerRoute(NamedTuple):
    """A prefix that is reached through the TUN."""

    prefix: Network
    mtu: int = 0
    """Largest packet in bytes, where it is less than the TUN's; 0: no limit of its own."""
    source: Address | None = None
    """Our source address towards it; None: our overlay address of its family."""


@dataclass(frozen=True, slots=True)
class InboundRule:
    """Who may reach what here. Raises `ValueError` for what makes no sense."""

    group: str
    """A certificate group, or "any"."""
    to: Literal["pods", "host"] = "pods"
    protocol: Literal["tcp", "udp", "icmp", "any"] = "any"
    """"icmp" is ICMP and ICMPv6; "any" with ports is TCP and UDP."""
    ports: tuple[tuple[int, int], ...] = ()
    """Ranges, both ends included; none: all ports."""

    def __post_init__(self) -> None:
        if self.to not in ("pods", "host") or self.protocol not in ("tcp", "udp", "icmp", "any"):
            raise ValueError(f"inbound rule for {self.protocol!r} to {self.to!r}")
        if self.ports and self.protocol == "icmp":
            raise ValueError("an inbound rule for icmp has no ports")
        if any(not 0 < low <= high < 65536 for low, high in self.ports):
            raise ValueError("ports of an inbound rule are 1 to 65535, the lower first")

    @staticmethod
    def ranges(ports: Iterable[str]) -> tuple[tuple[int, int], ...]:
        """Parse "443" and "8000-8010"; raises `ValueError`."""
        parsed = []
        for text in ports:
            low, _, high = text.partition("-")
            parsed.append((int(low), int(high or low)))
        return tuple(parsed)


@dataclass(frozen=True, slots=True)
class Desired:
    """What the host should look like. Prefixes of peers do not overlap; the CA sees to that."""

    tun: str = "crossedge0"
    mtu: int = MTU
    """Of the TUN, in bytes."""
    port: int = PORT
    """UDP port of the daemon, 0 if not known."""
    overlay: tuple[Address, ...] = ()
    """Our own overlay addresses, at most one of each family is used as a source."""
    pods: tuple[Network, ...] = ()
    """Our own pod prefixes."""
    mesh: tuple[Network, ...] = ()
    """The network's supernets, of pods and overlay."""
    peers: frozenset[PeerRoute] = frozenset()
    """Prefixes of members: pods and overlay addresses."""
    stock: frozenset[PeerRoute] = frozenset()
    """Prefixes of stock WireGuard peers, which need not be of the mesh."""
    inbound: tuple[InboundRule, ...] = ()
    """Empty: every member may reach pods and host. Else only what a rule says may be reached."""
    members: Mapping[str, frozenset[Network]] = field(default_factory=dict)
    """Source prefixes of the members of each group that a rule names; others are ignored."""


class RouteKey(NamedTuple):
    """By what the kernel tells routes apart: setting one replaces that of the same key."""

    table: int
    destination: Network
    metric: int


def key(route: Route) -> RouteKey:
    """Return what tells a route apart."""
    return RouteKey(route.table, route.destination, route.metric)


def wanted_routes(desired: Desired, device: int, versions: frozenset[int]) -> dict[RouteKey, Route]:
    """Return the routes for a TUN of index `device`, for IP versions that the kernel has."""
    routes = peer_routes(desired, (*desired.peers, *desired.stock), device, versions)
    others = []
    for prefix in desired.mesh:
        source = _source(desired, prefix.version)
        others.append(Route(prefix, device, None, source, TABLE, PROTOCOL, METRIC_MESH))
        others.append(_nowhere(prefix, TABLE, UNREACHABLE))
    for prefix in desired.pods:
        others.append(_nowhere(prefix, TABLE, THROW))
        others.append(_nowhere(prefix, RT_TABLE_MAIN, UNREACHABLE))
    routes.update((key(route), route) for route in others if route.destination.version in versions)
    return routes


def peer_routes(
    desired: Desired, peers: Iterable[PeerRoute], device: int, versions: frozenset[int]
) -> dict[RouteKey, Route]:
    """Return the routes to some prefixes of peers."""
    sources = {version: _source(desired, version) for version in (4, 6)}
    routes = {}
    for prefix, mtu, source in peers:
        version = prefix.version
        if version in versions:
            limit = mtu if mtu < desired.mtu else 0
            routes[RouteKey(TABLE, prefix, METRIC_PEER)] = Route(
                prefix, device, None, source or sources[version], TABLE, PROTOCOL, METRIC_PEER, limit
            )
    return routes


def _source(desired: Desired, version: int) -> Address | None:
    return next((address for address in desired.overlay if address.version == version), None)


def _nowhere(prefix: Network, table: int, kind: int) -> Route:
    return Route(prefix, table=table, protocol=PROTOCOL, metric=METRIC_NOWHERE, kind=kind)


def is_ours(route: Route) -> bool:
    """Tell whether a route is of our making (in the main table the routes of pods are not)."""
    if route.protocol != PROTOCOL:
        return False
    return route.table == TABLE or (route.table == RT_TABLE_MAIN and route.kind == UNREACHABLE)


def wanted_rules(versions: frozenset[int]) -> list[Rule]:
    """Return the rules that make the kernel look into our table."""
    families = {4: socket.AF_INET, 6: socket.AF_INET6}
    return [
        Rule(family, PRIORITY, TABLE, mark=MARK, invert=True, protocol=PROTOCOL)
        for version, family in families.items()
        if version in versions
    ]


def contains(outer: Network, inner: Network) -> bool:
    """Tell whether a network holds all of another, of whatever family."""
    if isinstance(outer, ipaddress.IPv4Network):
        return isinstance(inner, ipaddress.IPv4Network) and inner.subnet_of(outer)
    return isinstance(inner, ipaddress.IPv6Network) and inner.subnet_of(outer)


def overlaps(
    prefixes: Iterable[Network], pods: Iterable[Network], connected: Iterable[tuple[str, Network]]
) -> dict[Network, str]:
    """Return the prefixes that would swallow a network which the host is connected to; a text names both.

    A network within our own pod prefixes is no conflict: that is a bridge for our pods.
    """
    theirs = [
        (name, network) for name, network in connected if not any(contains(own, network) for own in pods)
    ]
    return {
        prefix: f"prefix {prefix} overlaps {network}, which the host is connected to by {name}"
        for name, network in theirs
        for prefix in prefixes
        if prefix.version == network.version and prefix.overlaps(network)
    }
