"""Routes, by raw netlink messages: thousands in a send, and dumps that the kernel filters."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from typing import NamedTuple

from crossedge.host.netlink import (
    FAMILY,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    U32,
    Address,
    Batch,
    Netlink,
    Network,
    Reply,
    attribute,
    attribute_u32,
    nested,
    parse_attributes,
)

RTM_NEWROUTE = 24
RTM_DELROUTE = 25
RTM_GETROUTE = 26
RTMSG = struct.Struct("=BBBBBBBBI")
"""Family, destination length, source length, TOS, table, protocol, scope, type, flags."""
RTNEXTHOP = struct.Struct("=HBBi")
"""Length, flags, weight, link index; its attributes follow."""
RTA_DST = 1
RTA_OIF = 4
RTA_GATEWAY = 5
RTA_PRIORITY = 6
RTA_PREFSRC = 7
RTA_METRICS = 8
RTA_MULTIPATH = 9
RTA_TABLE = 15
RTAX_MTU = 2
RTNH_F_ONLINK = 4
RTM_F_CLONED = 0x200
RT_TABLE_MAIN = 254
RTPROT_STATIC = 4
SCOPE_UNIVERSE = 0
SCOPE_LINK = 253
SCOPE_NOWHERE = 255
UNICAST = 1
UNREACHABLE = 7
THROW = 9


class Route(NamedTuple):
    """A route. Two are equal when the kernel would show them alike."""

    destination: Network
    device: int = 0
    """Link index; 0 for the kinds that lead nowhere."""
    gateway: Address | None = None
    source: Address | None = None
    """Preferred source address."""
    table: int = RT_TABLE_MAIN
    protocol: int = RTPROT_STATIC
    metric: int = 0
    mtu: int = 0
    kind: int = UNICAST
    onlink: bool = False
    """The gateway is reached by the link, whatever its addresses say."""


def _scope(route: Route) -> int:
    if route.destination.version == 4 and route.kind == UNICAST and route.gateway is None:
        return SCOPE_LINK
    return SCOPE_UNIVERSE


def _body(route: Route, scope: int) -> bytes:
    destination = route.destination
    table = route.table
    parts = [
        RTMSG.pack(
            FAMILY[destination.version],
            destination.prefixlen,
            0,
            0,
            table if table < 256 else 0,
            route.protocol,
            scope,
            route.kind,
            RTNH_F_ONLINK if route.onlink else 0,
        )
    ]
    if destination.prefixlen:
        parts.append(attribute(RTA_DST, destination.network_address.packed))
    parts.append(attribute_u32(RTA_TABLE, table))
    if route.device:
        parts.append(attribute_u32(RTA_OIF, route.device))
    if route.gateway is not None:
        parts.append(attribute(RTA_GATEWAY, route.gateway.packed))
    if route.source is not None:
        parts.append(attribute(RTA_PREFSRC, route.source.packed))
    if route.metric:
        parts.append(attribute_u32(RTA_PRIORITY, route.metric))
    if route.mtu:
        parts.append(nested(RTA_METRICS, attribute_u32(RTAX_MTU, route.mtu)))
    return b"".join(parts)


def set_route(batch: Batch, route: Route) -> None:
    """Make a route, in place of one with the same destination, table and metric.

    Give IPv6 routes a metric: the kernel takes 0 for 1024, and shows that.
    """
    batch.add(
        RTM_NEWROUTE,
        NLM_F_CREATE | NLM_F_REPLACE,
        _body(route, _scope(route)),
        f"set the route to {route.destination}",
    )


def add_route(batch: Batch, route: Route) -> None:
    """Make a route; one that exists already is an error."""
    batch.add(
        RTM_NEWROUTE,
        NLM_F_CREATE | NLM_F_EXCL,
        _body(route, _scope(route)),
        f"add the route to {route.destination}",
    )


def delete_route(batch: Batch, route: Route) -> None:
    """Delete a route; one that is gone already is no error."""
    gone = (errno.ESRCH, errno.ENODEV, errno.ENOENT)
    body = _body(route._replace(mtu=0, onlink=False), SCOPE_NOWHERE)  # which matches any scope
    batch.add(RTM_DELROUTE, 0, body, f"delete the route to {route.destination}", gone)


def list_routes(
    netlink: Netlink, *, family: int = socket.AF_UNSPEC, table: int = 0, protocol: int = 0
) -> list[Route]:
    """Return the routes of a family (both), table (all) and protocol (all).

    The kernel filters where it can (Linux 4.20), so a host that holds many routes of others costs nothing.
    """
    families = (family,) if family else (socket.AF_INET, socket.AF_INET6)
    routes: list[Route] = []
    for each in families:
        body = RTMSG.pack(each, 0, 0, 0, table if table < 256 else 0, protocol, 0, 0, 0)
        if table:
            body += attribute_u32(RTA_TABLE, table)
        try:
            replies = netlink.dump(RTM_GETROUTE, body, "list routes")
        except OSError as error:
            # ENOENT: the table was never used; EOPNOTSUPP, EAFNOSUPPORT: this kernel has no IPv6.
            if error.errno in (errno.ENOENT, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
                continue
            raise
        for reply in replies:
            route = parse_route(reply) if reply.kind == RTM_NEWROUTE else None
            if route is None or (table and route.table != table) or (protocol and route.protocol != protocol):
                continue
            routes.append(route)
    return routes


def parse_route(reply: Reply) -> Route | None:
    """Parse RTM_NEWROUTE or RTM_DELROUTE; None for caches and what is not IP.

    Of a route with several next hops the first is given.
    """
    family, length, _, _, table, protocol, _, kind, flags = RTMSG.unpack_from(reply.payload)
    if flags & RTM_F_CLONED or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    found = parse_attributes(reply.payload, RTMSG.size)

    def number(kind: int) -> int:
        data = found.get(kind, b"")
        return int(U32.unpack(data)[0]) if len(data) == U32.size else 0

    destination: Network
    if family == socket.AF_INET:
        destination = ipaddress.IPv4Network((found.get(RTA_DST, bytes(4)), length))
    else:
        destination = ipaddress.IPv6Network((found.get(RTA_DST, bytes(16)), length))
    device = number(RTA_OIF)
    gateway = found.get(RTA_GATEWAY)
    hops = found.get(RTA_MULTIPATH, b"")
    if not device and len(hops) >= RTNEXTHOP.size:
        size, _, _, device = RTNEXTHOP.unpack_from(hops)
        gateway = parse_attributes(hops[:size], RTNEXTHOP.size).get(RTA_GATEWAY)
    metrics = parse_attributes(found.get(RTA_METRICS, b""))
    mtu = metrics.get(RTAX_MTU, b"")
    source = found.get(RTA_PREFSRC)
    return Route(
        destination=destination,
        device=device if kind == UNICAST else 0,
        gateway=ipaddress.ip_address(gateway) if gateway else None,
        source=ipaddress.ip_address(source) if source else None,
        table=number(RTA_TABLE) or table,
        protocol=protocol,
        metric=number(RTA_PRIORITY),
        mtu=int(U32.unpack(mtu)[0]) if len(mtu) == U32.size else 0,
        kind=kind,
        onlink=bool(flags & RTNH_F_ONLINK),
    )
