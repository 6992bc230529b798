"""Our device, addresses, routes, rules in the kernel: compared with what is desired, set right in batches."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable

from crossedge.host.addresses import SCOPE_LINK, LinkAddress, add_address, delete_address, list_addresses
from crossedge.host.links import Link, get_link, set_link
from crossedge.host.monitor import Event
from crossedge.host.namespaces import Namespace
from crossedge.host.netlink import Batch, Interface, Netlink, NetlinkError
from crossedge.host.routes import RT_TABLE_MAIN, Route, delete_route, list_routes, set_route
from crossedge.host.rules import Rule, add_rule, delete_rule, list_rules
from crossedge.host.tun import Tun
from crossedge.meshd import desired as plan
from crossedge.meshd.desired import Desired, RouteKey
from crossedge.meshd.hostdevice import HostDevice

log = logging.getLogger(__name__)


class HostKernel:
    """What of us is in the kernel of one namespace. Made by `open`, in the thread that is there."""

    def __init__(
        self,
        namespace: Namespace,
        desired: Desired,
        versions: frozenset[int],
        count: Callable[[str, int], None],
        disable: frozenset[str] = frozenset(),
        on_tun: Callable[[Tun], None] | None = None,
    ) -> None:
        """`count` (kind, times) is called for what was set right; the rest is as `HostState` says."""
        self._versions = versions
        self._count = count
        self._netlink: Netlink | None = None
        self.device = HostDevice(namespace, disable, on_tun)
        self.desired = desired
        self.made_tun = False
        """Whether there was no such link before this was opened."""
        self.made_routing = False
        """Whether there was no route and no rule of ours before this was opened."""
        self.routes: dict[RouteKey, Route] = {}
        """Those that are desired."""

    def open(self, descriptor: int | None) -> None:
        """Open the device, or adopt the open one that is inherited; raises `OSError`."""
        self._netlink = netlink = Netlink()
        self.made_tun = get_link(netlink, self.desired.tun) is None
        self.made_routing = not our_routes(netlink) and not any(
            is_our_rule(rule) for rule in list_rules(netlink)
        )
        self.device.open(netlink, self.desired.tun, self.desired.mtu, descriptor)

    def close(self) -> None:
        """Close the device's descriptors; all stays in place."""
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None
        self.device.close()

    @property
    def tun(self) -> Tun | None:
        """The open device; None before `open`."""
        return self.device.tun

    @property
    def index(self) -> int:
        """Index of the link that has our addresses and routes."""
        return self.device.index

    def _opened(self) -> tuple[Netlink, HostDevice]:
        if self._netlink is None or self.device.tun is None:
            raise RuntimeError("the host's state is not started")
        return self._netlink, self.device

    # From one value to the next

    def change(self, desired: Desired) -> list[NetlinkError]:
        """Bring the kernel to another value, by one batch of the difference; return what was refused."""
        netlink, _ = self._opened()
        before, self.desired = self.desired, desired
        batch = Batch()
        if desired.mtu != before.mtu:
            set_link(batch, self.index, mtu=desired.mtu)
        old, new = self._interfaces(before), self._interfaces(desired)
        for interface in new - old:
            add_address(batch, self.index, interface)
        self._change_routes(batch, before, desired)
        for interface in old - new:  # last, for with an address the kernel deletes the routes from it
            delete_address(batch, self.index, interface)
        return netlink.execute(batch)

    def _change_routes(self, batch: Batch, before: Desired, desired: Desired) -> None:
        # With a thousand peers, to compare all routes takes far longer than to change the few of one peer.
        if all(
            getattr(before, name) == getattr(desired, name)
            for name in ("mtu", "overlay", "pods", "mesh", "stock")
        ):
            old, new = before.peers - desired.peers, desired.peers - before.peers
            had = plan.peer_routes(before, old, self.index, self._versions)
            wanted = plan.peer_routes(desired, new, self.index, self._versions)
            for place in had:
                self.routes.pop(place, None)
            self.routes.update(wanted)
        else:
            had, wanted = self.routes, plan.wanted_routes(desired, self.index, self._versions)
            self.routes = wanted
        for place in had.keys() - wanted.keys():
            delete_route(batch, had[place])
        for place, route in wanted.items():
            if had.get(place) != route:
                set_route(batch, route)

    def _interfaces(self, desired: Desired) -> frozenset[Interface]:
        return frozenset(
            ipaddress.ip_interface(address)
            for address in desired.overlay
            if address.version in self._versions
        )

    # What others did

    def concerned(self, event: Event) -> set[str]:
        """Return what must be synchronised after an event; nothing for our own changes."""
        item = event.item
        if event.kind == "overrun":
            return {"link", "address", "route", "rule"}
        if isinstance(item, Link):
            name, mtu = self.desired.tun, self.desired.mtu
            concerned = self.device.concerned(item, name, mtu, deleted=event.deleted)
            return {"link", "address", "route"} if concerned else set()
        if isinstance(item, LinkAddress):
            wanted = item.interface in self._interfaces(self.desired)
            # With an address the kernel silently deletes the routes that have it as their source.
            return {"address", "route"} if item.index == self.index and event.deleted == wanted else set()
        if isinstance(item, Route):
            ours_there = self.routes.get(plan.key(item))
            return {"route"} if ours_there is not None and (event.deleted or item != ours_there) else set()
        if isinstance(item, Rule):
            return {"rule"} if event.deleted and item.table == plan.TABLE else set()
        return set()

    def synchronise(self, kinds: set[str], repair: bool = True) -> list[NetlinkError]:
        """Compare parts ("link", "address", "rule", "route") with what is desired and set them right.

        What was missing is counted if `repair`, else it is taken for a start. Returns what the kernel
        refused; raises `OSError` where the device cannot be had.
        """
        netlink, _ = self._opened()
        if "link" in kinds and self._synchronise_link(repair):
            kinds = kinds | {"address", "route"}
        errors: list[NetlinkError] = []
        for kind, compare in (
            ("address", self._compare_addresses),
            ("rule", self._compare_rules),
            ("route", self._compare_routes),
        ):
            if kind in kinds:
                batch = Batch()
                missing = compare(netlink, batch)
                errors += netlink.execute(batch)
                if repair and missing:
                    self._count(kind, missing)
        return errors

    def _synchronise_link(self, repair: bool) -> bool:
        """Have the device as it should be; return whether addresses or routes may have gone with it."""
        netlink, device = self._opened()
        mended = device.synchronise(netlink, self.desired.tun, self.desired.mtu)
        if repair and mended.changed:
            self._count("link", 1)
        return mended.lost

    def _compare_addresses(self, netlink: Netlink, batch: Batch) -> int:
        wanted = self._interfaces(self.desired)
        listed = list_addresses(netlink, self.index)
        found = {address.interface for address in listed if address.scope != SCOPE_LINK}
        for interface in wanted - found:
            add_address(batch, self.index, interface)
        for interface in found - wanted:
            delete_address(batch, self.index, interface)
        return len(wanted - found)

    def _compare_rules(self, netlink: Netlink, batch: Batch) -> int:
        wanted = {rule._replace(protocol=0): rule for rule in plan.wanted_rules(self._versions)}
        found = {rule._replace(protocol=0): rule for rule in list_rules(netlink) if is_our_rule(rule)}
        missing = wanted.keys() - found.keys()
        for place in missing:
            add_rule(batch, wanted[place])
        for place in found.keys() - wanted.keys():
            delete_rule(batch, found[place])
        return len(missing)

    def _compare_routes(self, netlink: Netlink, batch: Batch) -> int:
        """Set what is missing; delete what an earlier life, or an earlier TUN, left."""
        wanted = plan.wanted_routes(self.desired, self.index, self._versions)
        found = set(our_routes(netlink))
        missing = [route for route in wanted.values() if route not in found]
        for route in found:
            if plan.key(route) not in wanted:
                delete_route(batch, route)
        for route in missing:
            set_route(batch, route)
        self.routes = wanted
        return len(missing)


def our_routes(netlink: Netlink) -> list[Route]:
    """Return all routes of our making, of this life or another."""
    found = list_routes(netlink, table=plan.TABLE, protocol=plan.PROTOCOL)
    found += list_routes(netlink, table=RT_TABLE_MAIN, protocol=plan.PROTOCOL)
    return [route for route in found if plan.is_ours(route)]


def is_our_rule(rule: Rule) -> bool:
    """Tell whether a rule is of our making, of this life or another."""
    return rule.plain and rule.table == plan.TABLE and rule.priority == plan.PRIORITY


def remove_routing() -> list[str]:
    """Delete our rules and routes in this thread's namespace; return what went. Raises `NetlinkError`."""
    removed = []
    batch = Batch()
    with Netlink() as netlink:
        for rule in list_rules(netlink):
            if is_our_rule(rule):
                delete_rule(batch, rule)
                removed.append(f"rule {rule.priority}")
        for route in our_routes(netlink):
            delete_route(batch, route)
            removed.append(f"route {route.destination}")
        netlink.run(batch)
    return removed
