"""What the host is connected to: networks, addresses, the MTU of the way out."""

from __future__ import annotations

import socket
from collections.abc import Collection
from typing import NamedTuple

from crossedge.host.addresses import SCOPE_UNIVERSE, list_addresses
from crossedge.host.links import list_links
from crossedge.host.netlink import FAMILY, Address, Netlink, Network
from crossedge.host.routes import RT_TABLE_MAIN, UNICAST, Route, list_routes


class HostAddress(NamedTuple):
    """An address that others may reach this host by."""

    interface: str
    address: Address
    way_out: bool
    """Whether the default route of its family leads through this interface."""


def connected_networks(
    exclude: Collection[str] = (), netlink: Netlink | None = None
) -> list[tuple[str, Network]]:
    """Return (interface, network) for what the host is connected to directly.

    Loopback and link-local networks, and the interfaces named in `exclude` (our TUN), are left out.
    """
    with _Opened(netlink) as opened:
        names = {link.index: link.name for link in list_links(opened)}
        found = [
            (names.get(address.index, f"link {address.index}"), address.network)
            for address in list_addresses(opened)
            if not address.network.is_loopback and not address.network.is_link_local
        ]
    return [(name, network) for name, network in found if name not in exclude]


def host_addresses(exclude: Collection[str] = (), netlink: Netlink | None = None) -> list[HostAddress]:
    """Return the addresses that may be tried by peers, those on the way out first.

    Left out: loopback, link-local and multicast, what is tentative or deprecated, links that are down, and
    the interfaces named in `exclude` (our TUN).
    """
    with _Opened(netlink) as opened:
        links = {link.index: link for link in list_links(opened)}
        addresses = list_addresses(opened)
        out = {family: _default_route(opened, family) for family in FAMILY.values()}
    found = []
    for each in addresses:
        link = links.get(each.index)
        address = each.interface.ip
        if link is None or not link.up or link.name in exclude or not each.usable:
            continue
        if (
            each.scope != SCOPE_UNIVERSE
            or address.is_loopback
            or address.is_link_local
            or address.is_multicast
        ):
            continue
        route = out[FAMILY[address.version]]
        found.append(HostAddress(link.name, address, route is not None and route.device == each.index))
    return sorted(found, key=lambda address: not address.way_out)


def default_route_mtu(family: int = socket.AF_INET, netlink: Netlink | None = None) -> int | None:
    """Return the largest packet, in bytes, of the default route of a family; None if there is none."""
    with _Opened(netlink) as opened:
        route = _default_route(opened, family)
        if route is None:
            return None
        link = next((link for link in list_links(opened) if link.index == route.device), None)
    return route.mtu or (link.mtu if link is not None else None)


def default_routes(netlink: Netlink | None = None) -> list[Route]:
    """Return the default route that the kernel prefers, of each family that has one."""
    with _Opened(netlink) as opened:
        found = [_default_route(opened, family) for family in FAMILY.values()]
    return [route for route in found if route is not None]


def _default_route(netlink: Netlink, family: int) -> Route | None:
    """Return the default route of the main table that the kernel prefers."""
    routes = list_routes(netlink, family=family, table=RT_TABLE_MAIN)
    defaults = [route for route in routes if not route.destination.prefixlen and route.kind == UNICAST]
    return min(defaults, key=lambda route: route.metric, default=None)


class _Opened:
    """A netlink socket that was given and stays open, or one of our own that is closed at the end."""

    def __init__(self, given: Netlink | None) -> None:
        self._given = given
        self._own: Netlink | None = None

    def __enter__(self) -> Netlink:
        if self._given is not None:
            return self._given
        self._own = Netlink()
        return self._own

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            self._own.close()
