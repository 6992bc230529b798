"""What others do to links, addresses, routes, rules and nftables, as it happens."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Iterable
from typing import NamedTuple

from crossedge.host import addresses, links, neighbours, routes, rules
from crossedge.host.addresses import LinkAddress
from crossedge.host.bpf import Program, attach
from crossedge.host.links import Link
from crossedge.host.neighbours import Neighbour
from crossedge.host.netlink import (
    NETLINK_ADD_MEMBERSHIP,
    NETLINK_NETFILTER,
    NETLINK_ROUTE,
    SOL_NETLINK,
    Reply,
    parse_attributes,
    parse_messages,
)
from crossedge.host.routes import Route
from crossedge.host.rules import Rule

ROUTE_GROUPS = {
    "link": (1,),
    "neighbour": (3,),
    "address": (5, 9),
    "route": (7, 11),
    "rule": (8, 19),
    "settings": (24, 25),
}
"""RTNLGRP_* of what can be watched, IPv4 and IPv6. "settings" are sysctls like forwarding and rp_filter."""
RTM_NEWNETCONF = 80
RTM_DELNETCONF = 81
NFNLGRP_NFTABLES = 7
NFNL_SUBSYS_NFTABLES = 10
NFT_MSG_DELCHAIN = 5
NFT_MSG_NEWCHAIN = 3
NFT_MSG_NEWGEN = 15
NFTA_TABLE = 1
NFGEN_SIZE = 4
SO_RCVBUFFORCE = 33
BUFFER = 4 * 1024 * 1024
READ = 64 * 1024
READS_PER_WAKEUP = 32

Item = Link | LinkAddress | Route | Rule | Neighbour


class Event(NamedTuple):
    """Something was made, changed or deleted. `kind` is a key of `ROUTE_GROUPS`, or "overrun".

    After an overrun events were lost: whoever keeps a picture must look again.
    """

    kind: str
    deleted: bool
    item: Item | None


class NftEvent(NamedTuple):
    """A transaction of nftables touched a table, or its chains; "" and `overrun` after events were lost."""

    table: str
    family: int
    chains: bool
    """Chains were made or deleted (not only their rules or the elements of a set)."""
    port: int
    """Netlink port of whoever did it: of a program that opened one socket, its process id."""
    overrun: bool = False


class _Socket:
    """A subscribed netlink socket on an event loop."""

    def __init__(self, protocol: int, groups: Iterable[int], only: Program = ()) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol
        )
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        try:
            if only:
                attach(self._socket, only)
            self._socket.bind((0, 0))
            for group in groups:
                self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        except BaseException:
            self._socket.close()
            raise

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Report from now on; what happened since the monitor was made is reported too."""
        self._loop = loop
        loop.add_reader(self._socket.fileno(), self._read)

    def close(self) -> None:
        """Stop; may be called twice."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop = None
        self._socket.close()

    def _read(self) -> None:
        for _ in range(READS_PER_WAKEUP):
            try:
                data = self._socket.recv(READ)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._overrun()
                continue
            for reply in parse_messages(data):
                self._handle(reply)
            if self._loop is None:
                return  # the callback closed us

    def _handle(self, reply: Reply) -> None:
        raise NotImplementedError

    def _overrun(self) -> None:
        raise NotImplementedError


class Monitor(_Socket):
    """Calls back for each change of the kinds that were asked for, in the namespace where it was made."""

    def __init__(
        self, callback: Callable[[Event], None], kinds: Iterable[str] = ROUTE_GROUPS, only: Program = ()
    ) -> None:
        """Subscribe at once, so that nothing between this and `start` is missed; `only` as a filter."""
        super().__init__(NETLINK_ROUTE, [group for kind in kinds for group in ROUTE_GROUPS[kind]], only)
        self._callback = callback

    def _handle(self, reply: Reply) -> None:
        event = parse_event(reply)
        if event is not None and self._loop is not None:
            self._callback(event)

    def _overrun(self) -> None:
        self._callback(Event("overrun", False, None))


class NftMonitor(_Socket):
    """Calls back once for each table that a transaction of nftables touched."""

    def __init__(self, callback: Callable[[NftEvent], None]) -> None:
        """Subscribe at once, so that nothing between this and `start` is missed."""
        super().__init__(NETLINK_NETFILTER, [NFNLGRP_NFTABLES])
        self._callback = callback
        self._touched: dict[tuple[str, int, int], bool] = {}

    def _handle(self, reply: Reply) -> None:
        if reply.kind >> 8 != NFNL_SUBSYS_NFTABLES or self._loop is None:
            return
        message = reply.kind & 0xFF
        if message == NFT_MSG_NEWGEN:  # ends a transaction
            touched, self._touched = self._touched, {}
            for (table, family, port), chains in touched.items():
                self._callback(NftEvent(table, family, chains, port))
            return
        name = parse_attributes(reply.payload, NFGEN_SIZE).get(NFTA_TABLE, b"").rstrip(b"\0")
        key = (name.decode(errors="replace"), reply.payload[0], reply.port)
        chains = message in (NFT_MSG_NEWCHAIN, NFT_MSG_DELCHAIN)
        self._touched[key] = self._touched.get(key, False) or chains

    def _overrun(self) -> None:
        self._touched.clear()
        self._callback(NftEvent("", 0, True, 0, overrun=True))


def parse_event(reply: Reply) -> Event | None:
    """Parse a message of the route protocol; None for what is not watched."""
    kind = reply.kind
    item: Item | None
    if kind in (RTM_NEWNETCONF, RTM_DELNETCONF):
        return Event("settings", kind == RTM_DELNETCONF, None)
    if kind in (links.RTM_NEWLINK, links.RTM_DELLINK):
        return Event("link", kind == links.RTM_DELLINK, links.parse_link(reply))
    if kind in (addresses.RTM_NEWADDR, addresses.RTM_DELADDR):
        item, deleted, name = addresses.parse_address(reply), kind == addresses.RTM_DELADDR, "address"
    elif kind in (routes.RTM_NEWROUTE, routes.RTM_DELROUTE):
        item, deleted, name = routes.parse_route(reply), kind == routes.RTM_DELROUTE, "route"
    elif kind in (rules.RTM_NEWRULE, rules.RTM_DELRULE):
        item, deleted, name = rules.parse_rule(reply), kind == rules.RTM_DELRULE, "rule"
    elif kind in (neighbours.RTM_NEWNEIGH, neighbours.RTM_DELNEIGH):
        item, deleted, name = neighbours.parse_neighbour(reply), kind == neighbours.RTM_DELNEIGH, "neighbour"
    else:
        return None
    return Event(name, deleted, item) if item is not None else None
