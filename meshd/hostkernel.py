"""Our TUN, addresses, routes and rules in the kernel: compared with what is desired, set right in batches."""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Callable

from crossedge.host.addresses import SCOPE_LINK, LinkAddress, add_address, delete_address, list_addresses
from crossedge.host.links import Link, delete_link, get_link, set_link
from crossedge.host.monitor import Event
from crossedge.host.namespaces import Namespace
from crossedge.host.netlink import Batch, Interface, Netlink, NetlinkError
from crossedge.host.routes import RT_TABLE_MAIN, Route, delete_route, list_routes, set_route
from crossedge.host.rules import Rule, add_rule, delete_rule, list_rules
from crossedge.host.tun import GSO_MAX_SIZE, Tun, attached_name, open_tun
from crossedge.meshd import desired as plan
from crossedge.meshd.desired import Desired, RouteKey

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
        self._namespace = namespace
        self._versions = versions
        self._count = count
        self._disable = disable
        self._on_tun = on_tun
        self._netlink: Netlink | None = None
        self.desired = desired
        self.tun: Tun | None = None
        self.index = 0
        """Of the TUN."""
        self.made_tun = False
        """Whether there was no such link before this was opened."""
        self.made_routing = False
        """Whether there was no route and no rule of ours before this was opened."""
        self.routes: dict[RouteKey, Route] = {}
        """Those that are desired."""

    def open(self, descriptor: int | None) -> None:
        """Open the TUN, or adopt the open one that is inherited; raises `OSError`.

        A descriptor whose device was deleted meanwhile, or has another name, is closed and not used.
        """
        self._netlink = Netlink()
        self.made_tun = get_link(self._netlink, self.desired.tun) is None
        self.made_routing = not our_routes(self._netlink) and not any(
            is_our_rule(rule) for rule in list_rules(self._netlink)
        )
        if descriptor is not None and attached_name(descriptor) != self.desired.tun:
            log.warning("the inherited TUN is not %s, and is not used", self.desired.tun)
            os.close(descriptor)
            descriptor = None
        self.tun = open_tun(
            self.desired.tun, descriptor=descriptor, disable=self._disable, mtu=self.desired.mtu
        )

    def close(self) -> None:
        """Close the TUN's descriptor; all stays in place."""
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None
        if self.tun is not None:
            self.tun.close()
            self.tun = None

    def _opened(self) -> tuple[Netlink, Tun]:
        if self._netlink is None or self.tun is None:
            raise RuntimeError("the host's state is not started")
        return self._netlink, self.tun

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
            ours = item.index == self.index and item.name == self.desired.tun
            if not ours and item.index != self.index and item.name != self.desired.tun:
                return set()
            fits = item.up and (item.mtu, item.gso_max_size) == (self.desired.mtu, GSO_MAX_SIZE)
            return set() if ours and fits and not event.deleted else {"link", "address", "route"}
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
        refused; raises `OSError` where the TUN cannot be had.
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
        """Have the TUN, under its name, up; return whether addresses or routes may have gone with it."""
        netlink, tun = self._opened()
        name = self.desired.tun
        lost = False
        if attached_name(tun.descriptor) != name or get_link(netlink, name) is None:
            lost = True
            self._find_tun(netlink, tun)
        link = get_link(netlink, name)
        if link is None:
            raise OSError(f"the TUN {name} is gone again")
        self.index = link.index
        fits = True
        if not link.up or not fits:
            batch = Batch()
            set_link(
                batch,
                self.index,
                up=True,
                mtu=self.desired.mtu,
                link_local=link.up,
            )
            netlink.run(batch)
        if repair and (lost or not link.up or not fits):
            self._count("link", 1)
        return lost or not link.up

    def _find_tun(self, netlink: Netlink, tun: Tun) -> None:
        """Give the TUN its name back, or make another where it is deleted or in another namespace."""
        name = self.desired.tun
        renamed = get_link(netlink, self.index) if attached_name(tun.descriptor) is not None else None
        if renamed is not None and renamed.kind == "tun":
            batch = Batch()
            set_link(batch, self.index, up=False)
            set_link(batch, self.index, rename=name)
            netlink.run(batch)
            return
        with self._namespace:
            self.tun = open_tun(name, disable=self._disable, mtu=self.desired.mtu)
        log.warning("the TUN %s was deleted and is made again", name)
        if self._on_tun is not None:
            self._on_tun(self.tun)
        tun.close()

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


def remove_tun(name: str) -> bool:
    """Delete a TUN in this thread's namespace; tell whether there was one. Raises `NetlinkError`."""
    batch = Batch()
    with Netlink() as netlink:
        link = get_link(netlink, name)
        if link is None or link.kind != "tun":
            return False
        delete_link(batch, link.index)
        netlink.run(batch)
    return True


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
